// SPDX-License-Identifier: Apache-2.0
#include "cuda/run.h"

#include <cuda/ptx.cuh>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

namespace fastnegate {

using cuda::Goal;
using cuda::Kernel;
using cuda::Launch;

namespace {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw CudaError(std::string(call) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// The runtime is linked statically: its current device is not torch's, and is left as it was.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (device != before) check(cudaSetDevice(device), "cudaSetDevice"), changed = true;
  }
  ~OnDevice() {
    if (changed) cudaSetDevice(before);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before = 0;
  bool changed = false;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// As cudaDriverGetVersion numbers it: 13000 is CUDA 13.0.
std::string release(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <class T>
Kernel kernel_of(CudaKind kind, int64_t dim) {
  switch (dim) {
#define FASTNEGATE_CASE(D) \
  case D: return cuda::kernel_of<T, D>(kind);
    FASTNEGATE_CUDA_DIMS(FASTNEGATE_CASE)
#undef FASTNEGATE_CASE
    default: return nullptr;
  }
}
Kernel kernel_of(const Problem& p, CudaKind kind) {
  const Kernel kernel = p.dtype == Dtype::float16    ? kernel_of<float16>(kind, p.dim)
                        : p.dtype == Dtype::bfloat16 ? kernel_of<bfloat16>(kind, p.dim)
                                                     : nullptr;
  if (!kernel) throw std::invalid_argument("no CUDA kernel for this dtype or head_dim");
  return kernel;
}

// A kernel has to be told on each device that it may take more than 48 KiB.
void allow_shared(Kernel kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  most = bytes;
}

}  // namespace

std::string cuda_unavailable() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no driver";
  if (driver < kOldestDriver)
    return "the driver is for CUDA " + release(driver) + ", older than " + release(kOldestDriver);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && devices == 0)) return "no CUDA device";
  if (error != cudaSuccess) return std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
  return "";
}

bool cuda_supports_dim(int dim) { return kernel_of<float16>(CudaKind::plain, dim) != nullptr; }

CudaPlan plan_cuda(const Problem& p, int device) {
  if (p.batch == 0 || p.heads == 0 || p.queries == 0) return {device, nullptr, {}};
  // The kernel numbers them with 32 bits.
  const int64_t most = std::numeric_limits<int>::max() / 2;
  if (std::max({p.batch * p.heads * ceil_div(p.queries, kCudaQueries), p.queries, p.keys, p.tokens, p.entries}) > most)
    throw std::invalid_argument("more than 2^30 queries, tiles of 16 queries, keys, concept tokens or entries");
  const OnDevice guard(device);
  // What rows have is known on the device, here only capacities are.
  const int64_t entries = p.concepts > 0 ? std::min(p.entries, p.busiest) : 0;
  const int64_t longest = p.rule.reads.tokens ? p.longest : 0;
  const CudaTiling tiling = cuda_tiling({p.batch, p.heads, p.queries, p.keys, p.dim, entries, longest,
                                         p.rule.reads.products,
                                         attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                         attribute(cudaDevAttrMultiProcessorCount, device)});
  if (tiling.warps == 0) throw std::invalid_argument("not even a piece of the text fits in shared memory");
  const Kernel kernel = kernel_of(p, tiling.kind);
  allow_shared(kernel, device, tiling.shared);
  return {device, kernel, tiling};
}

void run_cuda(const CudaPlan& plan, const Problem& p, const CudaTables& tables, void* stream) {
  if (!plan.kernel) return;
  for (const Strided* rows : {&p.query, &p.key, &p.value, &p.concept_key, &p.concept_value})
    if (reinterpret_cast<uintptr_t>(rows->data) % 16)
      throw std::invalid_argument("query, key, value or tokens of concepts do not begin at a multiple of 16 bytes");
  const OnDevice guard(plan.device);
  const Reads& reads = p.rule.reads;

  Launch launch{};
  launch.problem = p;
  launch.tiling = plan.tiling;
  // What the rule does not read is not there; an entry without a direction that the rule reads does not exist.
  Problem& q = launch.problem;
  if (!reads.direction) q.direction = q.offset = nullptr;
  if (q.entries == 0 || q.concepts == 0 || (reads.direction && !q.direction)) q.index = nullptr;
  launch.factor = p.scale * 1.44269504088896f;
  launch.bias_factor = 1.f / p.scale;
  launch.per_head = 1.f / static_cast<float>(p.heads);
  launch.moments = tables.moments, launch.norms = tables.norms;

  const auto start = [&](Goal goal, const char* name) {
    Launch l = launch;
    l.goal = goal;
    if (goal == Goal::moments) l.norms = nullptr;
    if (goal == Goal::output) l.trace_entries = tables.trace_entries, l.trace_rows = tables.trace_rows;
    void* arguments[] = {&l};
    check(cudaLaunchKernel(plan.kernel, dim3(l.tiling.blocks), dim3(l.tiling.warps * 32), arguments, l.tiling.shared,
                           static_cast<cudaStream_t>(stream)),
          name);
  };
  if (q.index && tables.moments) start(Goal::moments, "cudaLaunchKernel (moments)");
  if (q.index && tables.norms) start(Goal::norms, "cudaLaunchKernel (norms)");
  start(Goal::output, "cudaLaunchKernel");
}

}  // namespace fastnegate
