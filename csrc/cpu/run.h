// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <string>
#include <vector>

#include "fastnegate/problem.h"
#include "fastnegate/tile.h"

namespace fastnegate {

// Instruction sets this build holds and this machine runs, best first.
std::vector<std::string> usable_isas();

// Instruction sets this build holds.
std::vector<std::string> built_isas();

// Whether this process is a forked child, in which the kernel uses one thread.
bool is_forked();

// Runs the operator on `threads` threads with the named instruction set (one of usable_isas()).
// The result does not depend on the number of threads. Throws std::invalid_argument for sizes that
// the kernel does not take.
void run_cpu(const Problem& problem, const std::string& isa, int threads);

// How run_cpu cuts a problem of these sizes: B, H, N, M, T, D.
CpuTiling tiling(const std::string& isa, const std::array<int64_t, 6>& sizes, int threads);

// Floating-point operations per second of register-only multiply-adds, the best of some seconds: what
// benchmarks take a share of.
double fma_peak(const std::string& isa, int threads, double seconds);

}  // namespace fastnegate
