"""A Watch over works that only say whether they have ended; and ranks that die, in lost_rank.py."""

import gc
import json
import logging
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hook_cases import needs_extension

from gradacc_kernels import stalls

GROUP = SimpleNamespace(group_name="group")
SCRIPT = Path(__file__).with_name("lost_rank.py")


class Work:
    def __init__(self, has_ended=False):
        self.has_ended = has_ended
        self.asked = 0

    def is_completed(self):
        self.asked += 1
        return self.has_ended


@pytest.fixture
def store(monkeypatch):
    """Rank 0 of three, by a store in this process."""
    store = dist.HashStore()
    monkeypatch.setattr(stalls, "_store", lambda: store)
    monkeypatch.setattr(stalls.dist, "get_process_group_ranks", lambda group: [0, 1, 2])
    monkeypatch.setattr(stalls.dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(stalls, "NAP", 0.02)
    return store


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_what_does_not_end_is_told_once_with_bucket_and_rank(store, caplog):
    store.set(stalls._key(GROUP, 1), "6")  # in a reduction before
    store.set(stalls._key(GROUP, 2), "7")
    watch = stalls.Watch(GROUP, timeout=0.6)
    began = time.monotonic()
    watch.add(7, "bucket 2 of 6", Work(has_ended=True))
    watch.add(7, "bucket 3 of 6", Work())
    watch.add(7, "bucket 4 of 6", Work())
    assert until(lambda: watch.failure)
    assert 0.3 <= time.monotonic() - began
    assert "rank 0 has waited" in watch.failure
    assert "for bucket 3 of 6 in reduction 7: rank 1 did not come as far" in watch.failure
    assert store.get(stalls._key(GROUP, 0)) == b"7"
    assert until(lambda: not watch._thread.is_alive())
    assert [r.message for r in caplog.records] == [watch.failure]
    assert caplog.records[0].levelno == logging.ERROR


def test_what_ends_in_time_is_not_told(store, caplog):
    watch = stalls.Watch(GROUP, timeout=2.0)
    quick, slow = Work(has_ended=True), Work()
    watch.add(1, "bucket 0 of 2", quick)
    watch.add(1, "bucket 1 of 2", slow)
    time.sleep(0.1)
    assert quick.asked == slow.asked == 0  # not before half of the time has passed
    assert until(lambda: store.check([stalls._key(GROUP, 0)]))
    slow.has_ended = True
    assert until(lambda: not watch._under_way)
    time.sleep(0.7)  # past the time to tell
    assert watch.failure is None and not caplog.records


def test_where_all_wait_no_rank_is_blamed(store):
    for rank in (1, 2):
        store.set(stalls._key(GROUP, rank), "1")
    watch = stalls.Watch(GROUP, timeout=0.2)
    watch.add(1, "bucket 0 of 2", Work())
    assert until(lambda: watch.failure) and "all ranks wait" in watch.failure


def test_without_a_store_the_bucket_is_told(store, monkeypatch):
    def gone():
        raise dist.DistNetworkError("broken pipe")

    monkeypatch.setattr(stalls, "_store", gone)
    watch = stalls.Watch(GROUP, timeout=0.2)
    watch.add(1, "bucket 0 of 2", Work())
    assert until(lambda: watch.failure)
    assert "bucket 0 of 2" in watch.failure and "rank 0 may be gone: broken pipe" in watch.failure


def test_reductions_that_have_ended_are_forgotten(store):
    watch = stalls.Watch(GROUP, timeout=600.0)
    assert watch.tells_after == 590
    works = [Work(has_ended=True) for _ in range(300)]
    for index, work in enumerate(works):
        watch.add(index // 3, "a bucket", work)
        assert len(watch._under_way) <= 3
    assert sum(work.asked for work in works) == 99  # once a reduction
    watch.add(200, "a bucket", Work())
    watch.add(201, "a bucket", Work())  # the one before is under way
    assert len(watch._under_way) == 2


def test_a_host_that_runs_ahead_keeps_what_is_under_way_alone(store):
    watch = stalls.Watch(GROUP, timeout=600.0)
    works = [Work() for _ in range(300)]
    for index, work in enumerate(works):
        watch.add(index // 3, "a bucket", work)
        if index >= 6:
            works[index - 6].has_ended = True
        assert len(watch._under_way) <= 9


def test_many_windows_leave_one_key_a_rank(store):
    for reduction in range(1, 100):
        stalls._say(GROUP, reduction)
        assert stalls._silent(GROUP, reduction) == [1, 2]
    assert stalls._silent(GROUP, 98) == [1, 2]
    assert store.num_keys() == 1


def test_reductions_of_several_attachments_have_numbers_of_their_own(store, monkeypatch):
    monkeypatch.setattr(stalls, "_reductions", Counter())
    other = SimpleNamespace(group_name="other")
    assert [stalls.next_reduction(group) for group in (GROUP, GROUP, other)] == [1, 2, 1]
    store.set(stalls._key(GROUP, 1), "1")  # it waits for the first attachment
    stalls._say(GROUP, 2)
    assert stalls._silent(GROUP, 2) == [1, 2]
    assert stalls._silent(other, 1) == [0, 1, 2]


def test_what_the_device_raises_ends_the_watch_by_a_warning(store, caplog):
    def raises():
        raise RuntimeError("CUDA error: unspecified launch failure")

    watch = stalls.Watch(GROUP, timeout=0.2)
    watch.add(1, "a bucket", SimpleNamespace(is_completed=raises))
    assert until(lambda: not watch._thread.is_alive())
    assert "watched no more: CUDA error" in caplog.text and watch.failure is None


def test_a_process_group_that_was_destroyed_is_told(store, monkeypatch):
    def gone(group):
        raise KeyError(group)

    monkeypatch.setattr(stalls.dist, "get_process_group_ranks", gone)
    watch = stalls.Watch(GROUP, timeout=0.2)
    watch.add(1, "bucket 0 of 2", Work())
    assert until(lambda: watch.failure) and "bucket 0 of 2" in watch.failure


def test_its_thread_holds_nothing_and_ends_with_it(store):
    watch = stalls.Watch(GROUP, timeout=600.0)
    work = Work()
    watch.add(1, "a bucket", work)
    thread, references = watch._thread, [weakref.ref(watch), weakref.ref(work)]
    assert thread.daemon and thread.is_alive()
    del watch, work
    gc.collect()
    assert until(lambda: not any(reference() for reference in references))
    assert until(lambda: not thread.is_alive())


def lost(world_size, device, way, reduce_by):
    """What every rank but the last says when that one is lost, and how the process ended."""
    path = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parent.parent)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(SCRIPT), str(world_size), device, way, reduce_by]
    done = subprocess.run(command, env=env, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@needs_extension
@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_that_dies_in_backward_is_named_over_gloo(world_size):
    (said, stderr), dead = lost(world_size, "cpu", "dies", "all_reduce"), world_size - 1
    for rank in range(world_size - 1):
        told = said[str(rank)]
        assert f"rank {rank} could not reduce bucket" in told["error"], stderr[-3000:]
        assert "of 6 in reduction 2" in told["error"]
        assert told["seconds"] < 15
    # Those next to it find its connection closed; others may only see that these are gone.
    named = [told["error"].count(f": rank {dead} did not come as far") for told in said.values()]
    assert sum(named) >= min(2, world_size - 1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices are visible")
@pytest.mark.parametrize(
    "way, reduce_by", [("dies", "copies"), ("lags", "copies"), ("dies", "all_reduce")]
)
def test_a_rank_that_is_lost_is_named_on_gpus(way, reduce_by):
    said, stderr = lost(2, "cuda", way, reduce_by)
    assert "gradacc_kernels: rank 0 has waited" in stderr, stderr[-3000:]
    assert "of 6 in reduction 2: rank 1 did not come as far, or is gone" in stderr
    assert said["0"]["seconds"] < 100
