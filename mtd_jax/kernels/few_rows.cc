// Products of a few rows with a large matrix, [rows, depth] @ [depth, width] in float32, for CPUs.
//
// A decode step reads every weight once and multiplies it with one row, or with as many as there are
// drafts to verify. General matrix products repack the weights first, which costs a second pass over
// memory: with two rows already a step takes a third longer than with one. Here weights are used in
// the order in which they lie, kDepth rows of them at a time, against sums that stay in the first
// cache; so up to some eight rows cost little more than reading.
//
// Every row's sum is taken in the same order, however many rows there are: a step of several rows
// gives to the bit what several steps of one row give.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kGroup = 16;  // rows whose sums fit the registers, beside the weights
#else
constexpr int kLanes = 8;
constexpr int kGroup = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));

constexpr int64_t kDepth = 8;             // rows of weights between two loads of the sums
constexpr int64_t kSums = 4096;           // floats of sums in the first cache: 16 KiB
constexpr int64_t kMostColumns = 1024;    // of weights at a time; a page holds as many
constexpr int64_t kPart = 4096;           // columns that a thread takes at once, at least
constexpr int64_t kShared = 1 << 16;      // products of fewer weights are not worth a second thread

struct Product {
  const float* x;
  const float* weight;
  float* out;
  int64_t rows, depth, width;
};

// sums[r, :columns] += x[r, :kDepth] @ weight[:kDepth, :columns] for kRows rows.
template <int kRows>
void Add(const Product& p, const float* x, const float* weight, int64_t columns, float* sums,
         int64_t stride) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vector sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = *reinterpret_cast<Vector*>(sums + r * stride + c);
    for (int64_t k = 0; k < kDepth; ++k) {
      const float* at = weight + k * p.width + c;
      __builtin_prefetch(at + kDepth * p.width);
      const Vector value = *reinterpret_cast<const Vector*>(at);
      for (int r = 0; r < kRows; ++r) sum[r] += x[r * p.depth + k] * value;
    }
    for (int r = 0; r < kRows; ++r) *reinterpret_cast<Vector*>(sums + r * stride + c) = sum[r];
  }
}

using Adder = void (*)(const Product&, const float*, const float*, int64_t, float*, int64_t);

template <int... kRows>
constexpr auto Adders(std::integer_sequence<int, kRows...>) {
  return std::array<Adder, sizeof...(kRows)>{Add<kRows + 1>...};
}

constexpr auto kAdders = Adders(std::make_integer_sequence<int, kGroup>());

// The columns [begin, end) of the product.
void Columns(const Product& p, int64_t begin, int64_t end) {
  const int64_t room = std::max<int64_t>(kLanes, kSums / p.rows / kLanes * kLanes);
  const int64_t most = std::min(kMostColumns, room);
  std::vector<float> sums(p.rows * most);
  for (int64_t c = begin; c < end; c += most) {
    const int64_t columns = std::min(most, end - c);
    const int64_t whole = columns / kLanes * kLanes;
    std::fill(sums.begin(), sums.end(), 0.0f);
    const int64_t deep = p.depth / kDepth * kDepth;
    for (int64_t k = 0; k < deep; k += kDepth) {
      const float* weight = p.weight + k * p.width + c;
      for (int64_t r = 0; r < p.rows; r += kGroup) {
        const int64_t group = std::min<int64_t>(kGroup, p.rows - r);
        kAdders[group - 1](p, p.x + r * p.depth + k, weight, whole, sums.data() + r * most, most);
      }
    }
    // What is left of columns and of the depth.
    for (int64_t r = 0; r < p.rows; ++r) {
      float* sum = sums.data() + r * most;
      const float* x = p.x + r * p.depth;
      for (int64_t k = 0; k < p.depth; ++k) {
        const float* weight = p.weight + k * p.width + c;
        for (int64_t i = k < deep ? whole : 0; i < columns; ++i) sum[i] += x[k] * weight[i];
      }
      std::memcpy(p.out + r * p.width + c, sum, sizeof(float) * columns);
    }
  }
}

// Parts of the columns that threads take until none is left. Helpers that come too late find none;
// nobody waits for a thread that has not begun, so threads that all wait cannot block each other.
struct Work {
  std::atomic<int64_t> next{0}, done{0};
};

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                   ffi::ResultBuffer<ffi::F32> out) {
  const auto rows = x.dimensions();
  const auto sides = weight.dimensions();
  if (rows.size() != 2 || sides.size() != 2 || rows[1] != sides[0] ||
      out->element_count() != static_cast<size_t>(rows[0] * sides[1])) {
    return ffi::Error::InvalidArgument("few_rows: wants [rows, depth] and [depth, width]");
  }
  const Product product{x.typed_data(), weight.typed_data(), out->typed_data(),
                        rows[0],        rows[1],             sides[1]};
  if (product.rows == 0 || product.width == 0) return ffi::Error::Success();
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (product.depth * product.width < kShared) threads = 1;
  const int64_t vectors = (product.width + kLanes - 1) / kLanes;
  const int64_t parts =
      std::min(vectors, threads * std::max<int64_t>(1, product.width / (threads * kPart)));
  auto work = std::make_shared<Work>();
  auto take = [=] {
    for (int64_t part; (part = work->next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      const int64_t begin = vectors * part / parts * kLanes;
      const int64_t end = std::min(product.width, vectors * (part + 1) / parts * kLanes);
      Columns(product, begin, end);
      work->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = 1; helper < std::min(threads, parts); ++helper) pool.Schedule([take] { take(); });
  take();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < parts; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MtdFewRows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
