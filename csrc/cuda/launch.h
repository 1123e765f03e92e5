// SPDX-License-Identifier: Apache-2.0
// What the host gives the kernel, and what it knows of it.
#pragma once

#include <cstdint>

#include "fastnegate/problem.h"
#include "fastnegate/tile.h"

namespace fastnegate::cuda {

enum class Goal : int { output, moments, norms };

// Planes of the tables of sums over a head's channels, float32, by query.
enum MomentPlane { kZz, kZf, kFf, kAlong, kMass, kMomentPlanes };  // moments [planes, E, H, N]
constexpr int kNormPlanes = 2;                                     // norms [planes, B, H, N]: of Y, of Z

struct Launch {
  Problem problem;
  Goal goal;
  CudaTiling tiling;
  bool reads_tokens, reads_moments, reads_mass;  // by the rule, or for statistics
  float factor, bias_factor;  // of logits: scale * log2(e); of biases, which are added before: 1 / scale
  float per_head;             // 1 / H
  float *moments, *norms;    // for scope `feature`, else null
  float* trace_entries;      // [3, E, H, N] (gate, similarity, mass), cleared; or null
  float* trace_rows;         // [4, B, H, N] (|O - Z|^2, |Z|^2, whether limited, values that are not finite)
};

using Kernel = void (*)(Launch);
// The kernel for a head_dim, or null.
Kernel kernel_float16(int dim);
Kernel kernel_bfloat16(int dim);

}  // namespace fastnegate::cuda
