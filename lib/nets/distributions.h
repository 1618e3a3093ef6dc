#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

namespace retain {
using at::Tensor;

/// A policy's distribution over actions at every [T, B] (any leading shape works). log_prob() and
/// sample() throw c10::Error on another shape, log_prob() on discrete actions that are not int64.
class Distribution {
 public:
  virtual ~Distribution() = default;
  virtual Tensor log_prob(const Tensor& action) const = 0;  ///< [T, B]
  virtual Tensor entropy() const = 0;                       ///< [T, B]
  virtual Tensor mode() const = 0;                          ///< The most likely action.
  virtual int64_t uniforms() const = 0;  ///< How many uniform numbers one sample takes.
  /// The action that uniform [T, B, uniforms()] in (0, 1) selects by the inverse distribution
  /// function: the same numbers give the same action on any device and in any batch.
  virtual Tensor sample(const Tensor& uniform) const = 0;
};

/// logits [T, B, A]; legal [T, B, A] bool or undefined (all legal). An illegal action has
/// probability 0 and takes no part in the entropy; where one action alone is legal, log_prob and
/// entropy are exactly 0. Actions [T, B] int64. Throws c10::Error naming the argument on a wrong
/// shape, on a `legal` that is not bool and, on the CPU, where no action is legal.
std::unique_ptr<Distribution> make_categorical(const Tensor& logits, const Tensor& legal = {});

/// Independent categoricals; logits [T, B, sum(num_values)]. Actions [T, B, num_values.size()]
/// int64. Throws c10::Error naming the argument on a wrong shape and if num_values is empty or has
/// an entry below 1.
std::unique_ptr<Distribution> make_multi_discrete(const Tensor& logits,
                                                  const std::vector<int64_t>& num_values);

/// Independent normals; mean [T, B, A], log_std [A]. Actions [T, B, A] of mean's dtype; two
/// uniforms (Box–Muller) each. Throws c10::Error naming the argument on a wrong shape.
std::unique_ptr<Distribution> make_gaussian(const Tensor& mean, const Tensor& log_std);

}  // namespace retain
