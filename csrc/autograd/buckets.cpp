#include "buckets.h"

#include <algorithm>

namespace gradacc {

Buckets::Buckets(std::vector<int64_t> bucket_of) : bucket_of_(std::move(bucket_of)) {
  const auto most = std::max_element(bucket_of_.begin(), bucket_of_.end());
  params_of_.resize(most == bucket_of_.end() ? 0 : *most + 1);
  for (size_t i = 0; i < bucket_of_.size(); ++i)
    params_of_[bucket_of_[i]].push_back(static_cast<int64_t>(i));
  reset();
}

void Buckets::reset() {
  has_arrived_.assign(bucket_of_.size(), false);
  missing_.clear();
  for (const auto& params : params_of_) missing_.push_back(static_cast<int64_t>(params.size()));
  next_ = 0;
}

Buckets::Range Buckets::arrived(int64_t param) {
  if (!has_arrived_[param]) {
    has_arrived_[param] = true;
    --missing_[bucket_of_[param]];
  }
  const int64_t first = next_;
  while (next_ < static_cast<int64_t>(missing_.size()) && missing_[next_] == 0) ++next_;
  return {first, next_};
}

Buckets::Range Buckets::rest() {
  const int64_t first = next_;
  next_ = static_cast<int64_t>(missing_.size());
  return {first, next_};
}

}  // namespace gradacc
