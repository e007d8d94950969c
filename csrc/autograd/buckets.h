// Which buckets of main gradients a backward has completed, for a reduction that begins meanwhile.
//
// A bucket is complete when every parameter of it has arrived: its AccumulateGrad node has run, so
// nothing more is added to it. Buckets are handed out in order of their numbers, whatever the order
// in which they complete, because all ranks must reduce them in the same one.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace gradacc {

class Buckets {
 public:
  struct Range {
    int64_t first, last;  // without last
  };

  // bucket_of: the bucket of each parameter; every bucket has one at least.
  explicit Buckets(std::vector<int64_t> bucket_of);

  // Begins anew.
  void reset();
  // Whether a bucket was handed out since.
  bool has_begun() const { return next_ > 0; }
  bool is_handed_out(int64_t param) const { return bucket_of_[param] < next_; }
  // The parameter will get nothing more. Returns what can be reduced now.
  Range arrived(int64_t param);
  // All that is left.
  Range rest();
  const std::vector<int64_t>& params_of(int64_t bucket) const { return params_of_[bucket]; }

 private:
  std::vector<int64_t> bucket_of_;
  std::vector<std::vector<int64_t>> params_of_;
  std::vector<bool> has_arrived_;
  std::vector<int64_t> missing_;  // of each bucket
  int64_t next_ = 0;              // to be handed out
};

}  // namespace gradacc
