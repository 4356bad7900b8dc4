// Products of a few rows with a large matrix, [rows, depth] @ [depth, width] in float32, for CPUs.
//
// A decode step reads every weight once and multiplies it with one row, or with as many as there are
// drafts to verify. General matrix products repack the weights first, which costs a second pass over
// memory: with two rows already a step takes a third longer than with one. Here weights are used in
// the order in which they lie, kDepth rows of them at a time, against sums that stay in the first
// cache; so up to some twelve rows cost little more than reading.
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
constexpr int kGroup = 12;  // rows whose sums fit the registers, beside the weights
#else
constexpr int kLanes = 8;
constexpr int kGroup = 6;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));

constexpr int64_t kTile = 2 * kLanes;  // columns whose sums are in registers at a time
constexpr int kDepth = 8;              // rows of weights between two loads of the sums
constexpr int64_t kSums = 4096;        // floats of sums in the first cache: 16 KiB
constexpr int64_t kMostRows = kSums / kTile;
constexpr int64_t kMostColumns = 512;  // of weights at a time: half a page holds as many
constexpr int64_t kPart = 4096;        // columns that a thread takes at once, at least
constexpr int64_t kShared = 1 << 16;   // products of fewer weights are not worth a second thread

struct Product {
  const float* x;
  const float* weight;
  float* out;
  int64_t rows, depth, width;
};

// sums[tile][r] += x[:, r] @ weight[:kDepth, tile] for kRows rows. What is multiplied next time is
// fetched meanwhile. Loops of constant length are unrolled: sums must stay in registers.
template <int kRows>
void Add(const float* __restrict x, const float* __restrict weight, int64_t width, int64_t tiles,
         float* __restrict sums) {
  for (int64_t t = 0; t < tiles; ++t, weight += kTile, sums += kRows * kTile) {
    Vector sum[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = *reinterpret_cast<Vector*>(sums + r * kTile);
      sum[r][1] = *reinterpret_cast<Vector*>(sums + r * kTile + kLanes);
    }
    const float* at = weight;
    const float* next = weight + kDepth * width;
#pragma GCC unroll 16
    for (int k = 0; k < kDepth; ++k, at += width, next += width) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + kLanes);
      const Vector left = *reinterpret_cast<const Vector*>(at);
      const Vector right = *reinterpret_cast<const Vector*>(at + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += x[k * kRows + r] * left;
        sum[r][1] += x[k * kRows + r] * right;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      *reinterpret_cast<Vector*>(sums + r * kTile) = sum[r][0];
      *reinterpret_cast<Vector*>(sums + r * kTile + kLanes) = sum[r][1];
    }
  }
}

using Adder = void (*)(const float*, const float*, int64_t, int64_t, float*);

template <int... kRows>
constexpr auto Adders(std::integer_sequence<int, kRows...>) {
  return std::array<Adder, sizeof...(kRows)>{Add<kRows + 1>...};
}

constexpr auto kAdders = Adders(std::make_integer_sequence<int, kGroup>());

// Rows whose sums are taken together, and their x [depth, count]: one load after another.
struct Group {
  int64_t first, count;
  std::vector<float> x;
};

std::vector<Group> Groups(const Product& p) {
  const int64_t number = (p.rows + kGroup - 1) / kGroup;
  std::vector<Group> groups;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t first = p.rows * i / number;
    const int64_t count = p.rows * (i + 1) / number - first;
    Group group{first, count, std::vector<float>(p.depth * count)};
    float* to = group.x.data();
    for (int64_t k = 0; k < p.depth; ++k) {
      for (int64_t r = 0; r < count; ++r) *to++ = p.x[(first + r) * p.depth + k];
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

// The columns [begin, end) of the product.
void Columns(const Product& p, const std::vector<Group>& groups, int64_t begin, int64_t end) {
  const int64_t most = std::min(kMostColumns, kSums / p.rows / kTile * kTile);
  // In whole cache lines: sixteen rows take half as long again where every vector lies across two.
  alignas(64) float sums[kSums];
  for (int64_t c = begin; c < end; c += most) {
    const int64_t columns = std::min(most, end - c);
    const int64_t tiles = columns / kTile;
    const int64_t deep = p.depth / kDepth * kDepth;
    std::fill(sums, sums + p.rows * most, 0.0f);
    for (int64_t k = 0; k < deep; k += kDepth) {
      const float* weight = p.weight + k * p.width + c;
      for (const Group& g : groups) {
        const float* x = g.x.data() + k * g.count;
        kAdders[g.count - 1](x, weight, p.width, tiles, sums + g.first * most);
      }
    }
    for (const Group& g : groups) {
      for (int64_t r = 0; r < g.count; ++r) {
        float* out = p.out + (g.first + r) * p.width + c;
        for (int64_t t = 0; t < tiles; ++t) {
          const float* sum = sums + g.first * most + (t * g.count + r) * kTile;
          std::memcpy(out + t * kTile, sum, sizeof(float) * kTile);
        }
        // What is left of the columns and of the depth.
        std::fill(out + tiles * kTile, out + columns, 0.0f);
        for (int64_t k = 0; k < p.depth; ++k) {
          const float* weight = p.weight + k * p.width + c;
          const float x = g.x[k * g.count + r];
          for (int64_t i = k < deep ? tiles * kTile : 0; i < columns; ++i) out[i] += x * weight[i];
        }
      }
    }
  }
}

// Parts of the columns that threads take until none is left. Helpers that come too late find none;
// nobody waits for a thread that has not begun, so threads that all wait cannot block each other.
struct Work {
  Product product;
  std::vector<Group> groups;
  int64_t parts;
  std::atomic<int64_t> next{0}, done{0};

  void Take() {
    const int64_t tiles = (product.width + kTile - 1) / kTile;
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      const int64_t begin = tiles * part / parts * kTile;
      const int64_t end = std::min(product.width, tiles * (part + 1) / parts * kTile);
      Columns(product, groups, begin, end);
      done.fetch_add(1, std::memory_order_release);
    }
  }
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
  if (product.rows > kMostRows) return ffi::Error::InvalidArgument("few_rows: too many rows");
  if (product.rows == 0 || product.width == 0) return ffi::Error::Success();
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (product.depth * product.width < kShared) threads = 1;
  const int64_t each = std::max<int64_t>(1, product.width / (threads * kPart));
  auto work = std::make_shared<Work>();
  work->product = product;
  work->groups = Groups(product);
  work->parts = std::min((product.width + kTile - 1) / kTile, threads * each);
  for (int64_t helper = 1; helper < std::min(threads, work->parts); ++helper) {
    pool.Schedule([work] { work->Take(); });
  }
  work->Take();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < work->parts; ++spins) {
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
