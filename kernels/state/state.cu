// Copies and clears the parts of a memory. A block owns a piece of one part: the grid's y names the
// part, its x the piece; words of 16 bytes where all rows lie so, else single bytes.

#include <retain/kernels/state/state_cuda.h>
#include <retain/kernels/common/device.cuh>

#include <algorithm>

namespace retain::kernels {
namespace {

constexpr int kThreads = 256, kWordsAThread = 2;

struct Mask {
  const bool* data;
  int64_t stride;
};

/// kCopy: all of the part; otherwise zeros in the rows that the mask names.
template <typename Word, bool kCopy>
__device__ __forceinline__ void treat(const StatePart& part, int64_t B, const Mask& mask) {
  const int64_t row_words = part.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t words = B * row_words, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += stride) {
    if (kCopy) {
      static_cast<Word*>(part.to)[i] = static_cast<const Word*>(part.from)[i];
    } else if (mask.data[i / row_words * mask.stride]) {
      static_cast<Word*>(part.to)[i] = Word{};
    }
  }
}

template <bool kCopy>
__global__ __launch_bounds__(kThreads) void state_rows(const __grid_constant__ StatePartsCuda p,
                                                       Mask mask) {
  const StatePart& part = p.part[blockIdx.y];
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (part.row_bytes % 16 == 0 && aligned(part.to) && aligned(part.from)) {
    treat<uint4, kCopy>(part, p.B, mask);
  } else {
    treat<unsigned char, kCopy>(part, p.B, mask);
  }
}

template <bool kCopy>
void launch(const StatePartsCuda& p, const Mask& mask, CudaStream stream) {
  int64_t largest = 0;
  for (int i = 0; i < p.count; ++i) largest = std::max(largest, p.B * p.part[i].row_bytes);
  if (largest == 0) return;
  constexpr int64_t kBlocks = 4096, kPiece = int64_t{kThreads} * kWordsAThread * 16;
  const int64_t blocks = std::min(kBlocks, (largest + kPiece - 1) / kPiece);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.count));
  state_rows<kCopy><<<grid, kThreads, 0, stream>>>(p, mask);
  check_launch(kCopy ? "state: copy" : "state: zero");
}

}  // namespace

void copy_state_cuda(const StatePartsCuda& parts, CudaStream stream) {
  launch<true>(parts, {}, stream);
}

void zero_state_cuda(const StatePartsCuda& parts, const bool* mask, int64_t mask_stride,
                     CudaStream stream) {
  launch<false>(parts, {mask, mask_stride}, stream);
}

}  // namespace retain::kernels
