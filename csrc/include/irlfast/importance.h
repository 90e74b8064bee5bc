// Self-normalised importance weights within groups, and their gradient.
#pragma once

#include <cmath>
#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/host_device.h"
#include "irlfast/isa.h"

namespace irlfast {

struct ImportanceInput {
  const void* log_target = nullptr;  // [rows], as log_proposal; float or double
  const void* log_proposal = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  const int64_t* groups = nullptr;  // [rows] ids in any order; null makes one group
  double clip_low = 0;              // on l - log Z; -inf and inf for none
  double clip_high = 0;
  double temper = 1;

  // Whether weights are any other than the shares of the ratios as they are.
  IRLFAST_HOST_DEVICE bool reshapes() const { return temper != 1 || clip_low != -INFINITY || clip_high != INFINITY; }
};

// In the input's type. One normaliser and one ESS a group, by rising id; space for as many as there are rows.
struct ImportanceOutput {
  void* weights = nullptr;
  void* log_normalizer = nullptr;
  void* ess = nullptr;
};

// The number of groups, 0 without rows; or -(i + 1) where log_target[i] - log_proposal[i] is NaN or +inf, and nothing
// is written.
int64_t importance_weights_forward(const ImportanceInput& input, const ImportanceOutput& output, int threads, Isa isa);

// Upstream gradients as the outputs, null for zero; writes the gradient to log_target, whose negative is
// log_proposal's.
void importance_weights_backward(const ImportanceInput& input, const void* grad_weights,
                                 const void* grad_log_normalizer, const void* grad_ess, void* gradient, int threads,
                                 Isa isa);

}  // namespace irlfast
