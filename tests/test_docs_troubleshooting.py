"""docs/troubleshooting.md has an entry for each message that the package raises, warns of or logs.

An entry is a row whose first cell has messages in code spans, with … for what varies and for what
was left out. Sources are read, not run: a message is the text that is written there, with … for
each value in it. So another wording fails here only where it changes what an entry quotes.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/troubleshooting.md"
GAP = "…"
LEAST = 10  # letters that a quote has, so that it does not fit everything

# Functions and constants whose texts become messages, or parts of them, elsewhere.
TEXTS = {
    "copies.py": ["why_not", "_why_not_met", "_seen"],
    "dispatch.py": ["extension", "why_missing"],
    "fsdp.py": ["WAITING"],
    "hook.py": ["_why_pending"],
    "lockstep.py": ["_describe"],
    "setup.py": ["why_no_cuda"],
    "stalls.py": ["_no_answer", "_describe", "_fail"],
    "window.py": ["BROKEN"],
}
# Which modules raise, warn or log what has hardly a text in the source, and whose text that is.
RELAYS = {
    "__main__.py": "argparse's",
    "cublaslt.cpp": "the name of a call, and cuBLASLt's reason",
    "checks.py": "a name, dtypes: _check_dtype",
    "experts.py": "the name of an attribute",
    "fsdp.py": "WAITING",
    "hook.py": "those of dispatch.choose",
    "lockstep.py": "_describe",
    "optimizers.py": "those of hook.py",
    "report.py": "json's",
    "reducer.py": "those of stalls.py",
    "stalls.py": "_no_answer, _fail",
    "tune.py": "in a warning of its own, or by argparse",
    "window.py": "BROKEN",
}
STRING = r'"(?:[^"\\]|\\.)*"'
TELLS = {"warnings.warn", "_log.warning", "_log.error", "say", "sys.exit"}


def text_of(node):
    """The text that an expression has in the source, with a gap for each value."""
    if isinstance(node, ast.Constant):
        return re.sub(r"\{\}|%s", GAP, node.value) if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return GAP


def letters(text):
    """How many letters a message has of its own."""
    return len(re.findall("[a-zA-Z]", text.removeprefix("gradacc_kernels: ")))


def python_messages(path):
    """(line, text) of what a module raises, warns of, logs and prints in place of that."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += [(node.lineno, "".join(map(text_of, node.exc.args[:1])))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in TELLS:
            found += [(node.lineno, text_of(node.args[0]))]
    for name in TEXTS.get(path.name, []):
        found += list(_named_texts(tree, name))
    return found


def _named_texts(tree, name):
    """The texts that a function may return or a constant has, each of them."""
    functions = [n for n in ast.walk(tree) if getattr(n, "name", None) == name]
    constants = [n for n in tree.body if isinstance(n, ast.Assign)]
    nodes = functions or [n for n in constants if name in map(ast.unparse, n.targets)]
    assert nodes, f"there is no {name}: TEXTS is out of date"
    for node in ast.walk(ast.Module(nodes)):
        if isinstance(node, (ast.Return, ast.Assign)) and node.value:
            text = text_of(node.value)
            if text != GAP and letters(text) >= LEAST:
                yield node.lineno, text


def cxx_messages(path):
    """(line, text) of the TORCH_CHECKs of a file."""
    source = path.read_text()
    for check in re.finditer(r"TORCH_(?:CHECK|WARN)\w*\(", source):
        parts = list(_arguments(source, check.end()))
        first = 0 if "WARN" in check[0] else 1
        text = "".join(_literal(part) for part in parts[first:])
        yield source.count("\n", 0, check.start()) + 1, text


def _arguments(source, at):
    """The arguments of a call whose parenthesis opens before a position."""
    depth, begin = 0, at
    for token in re.compile(rf"{STRING}|[][(){{}},]").finditer(source, at):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        if depth < 0 or (depth == 0 and token[0] == ","):
            yield source[begin : token.start()].strip()
            begin = token.end()
        if depth < 0:
            return


def _literal(argument):
    if not re.fullmatch(rf"(?:{STRING}\s*)+", argument):
        return GAP
    return "".join(map(ast.literal_eval, re.findall(STRING, argument)))


@cache
def messages():
    """{where: text} of all messages of the package."""
    python = [ROOT / "setup.py", *sorted((ROOT / "gradacc_kernels").rglob("*.py"))]
    cxx = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return {
        f"{path.relative_to(ROOT)}:{line}": text
        for read, paths in ((python_messages, python), (cxx_messages, cxx))
        for path in paths
        for line, text in read(path)
    }


def quotes(page):
    """What a page quotes: the code spans in the first cells of its tables, but for the last one."""
    page = page.partition("\n## No message\n")[0]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def is_quoted(text, quote):
    """Whether a message reads as a quote does, whose gaps stand for anything."""
    return re.fullmatch(".*".join(map(re.escape, quote.split(GAP))), text, re.DOTALL) is not None


def unanswered(page, texts):
    """The messages that no entry of a page quotes."""
    known = quotes(page)
    return {w: t for w, t in texts.items() if not any(is_quoted(t, quote) for quote in known)}


def test_every_message_has_an_entry():
    told = {where: text for where, text in messages().items() if letters(text) >= LEAST}
    assert len(told) > 200
    missing = unanswered(PAGE.read_text(), told)
    assert not missing, "\n".join(f"{where}: {text}" for where, text in missing.items())


def test_messages_without_a_text_are_of_modules_that_relay_others():
    bare = {where for where, text in messages().items() if letters(text) < LEAST}
    modules = {Path(where.split(":")[0]).name for where in bare}
    assert modules <= RELAYS.keys(), "whose text is it? Add the function to TEXTS"


def test_every_entry_quotes_a_message_and_says_what_to_do():
    page = PAGE.read_text()
    stale = [q for q in quotes(page) if not any(is_quoted(t, q) for t in messages().values())]
    assert not stale
    assert not [quote for quote in quotes(page) if letters(quote) < LEAST]
    for row in (line for line in page.splitlines() if line.startswith("| ")):
        assert len(list(filter(None, row.strip("| ").split(" | ")))) == 3, row


@pytest.mark.parametrize(
    "text",
    ["attach: no such message", "scale must be finite in float32", "there are … ranks"],
)
def test_a_message_without_an_entry_is_found(text):
    assert unanswered(PAGE.read_text(), {"here": text}) == {"here": text}


def test_what_a_source_says_is_read(tmp_path):
    python = tmp_path / "module.py"
    python.write_text(
        'raise ValueError(f"a {b!r} " "c")\nwarnings.warn("d" + e, stacklevel=2)\nraise f\n'
    )
    assert python_messages(python) == [(1, "a … c"), (2, "d…")]
    cxx = tmp_path / "module.cpp"
    cxx.write_text('TORCH_CHECK(f("x", 1) == 2, "a (", g("y", 3),\n  ") b" " \\"c\\"");\n')
    assert list(cxx_messages(cxx)) == [(1, 'a (…) b "c"')]
