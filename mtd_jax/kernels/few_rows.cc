// A few rows in float32, for CPUs: their products with a large matrix, [rows, depth] @ [depth, width],
// and their attention to the keys and values of a cache.
//
// A decode step reads every weight once and multiplies it with one row, or with as many as there are
// drafts to verify. General matrix products repack the weights first, which costs a second pass over
// memory: with two rows already a step takes a quarter to a third longer than with one. Here weights are used in
// the order in which they lie, kDepth rows of them at a time, against sums that stay in the first
// cache; so up to some twelve rows cost little more than reading.
//
// Attention is two such products with a softmax between them, for each key head and all rows that share
// it. The cache is read where it lies, and no further than a row sees.
//
// Every row's sums are taken in the same order, however many rows there are: a step of several rows
// gives to the bit what several steps of one row give.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
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
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

constexpr int64_t kTile = 2 * kLanes;  // columns whose sums are in registers at a time
constexpr int kDepth = 8;              // rows of weights between two loads of the sums
constexpr int64_t kSums = 4096;        // floats of sums in the first cache: 16 KiB
constexpr int64_t kMostRows = kSums / kTile;
constexpr int64_t kMostColumns = 512;  // of weights at a time: half a page holds as many
constexpr int64_t kPart = 4096;        // columns that a thread takes at once, at least
constexpr int64_t kShared = 1 << 16;   // products of fewer weights are not worth a second thread
constexpr int64_t kAttended = 1 << 18;  // nor is attention of fewer products of a row and a slot

struct Product {
  const float* x;
  const float* weight;
  float* out;
  int64_t rows, depth, width;
  int64_t stride;  // from a row of the weight to the next
};

// sums[tile][r] += x[:, r] @ weight[:kDepth, tile] for kRows rows. What is multiplied next time is
// fetched meanwhile. Loops of constant length are unrolled: sums must stay in registers.
template <int kRows>
void Add(const float* __restrict x, const float* __restrict weight, int64_t stride, int64_t tiles,
         float* __restrict sums) {
  for (int64_t t = 0; t < tiles; ++t, weight += kTile, sums += kRows * kTile) {
    Vector sum[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = *reinterpret_cast<Vector*>(sums + r * kTile);
      sum[r][1] = *reinterpret_cast<Vector*>(sums + r * kTile + kLanes);
    }
    const float* at = weight;
    const float* next = weight + kDepth * stride;
#pragma GCC unroll 16
    for (int k = 0; k < kDepth; ++k, at += stride, next += stride) {
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
  // In whole cache lines: sixteen rows take 1.4 times as long where every vector lies across two.
  alignas(64) float sums[kSums];
  for (int64_t c = begin; c < end; c += most) {
    const int64_t columns = std::min(most, end - c);
    const int64_t tiles = columns / kTile;
    const int64_t deep = p.depth / kDepth * kDepth;
    std::fill(sums, sums + p.rows * most, 0.0f);
    for (int64_t k = 0; k < deep; k += kDepth) {
      const float* weight = p.weight + k * p.stride + c;
      for (const Group& g : groups) {
        const float* x = g.x.data() + k * g.count;
        kAdders[g.count - 1](x, weight, p.stride, tiles, sums + g.first * most);
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
          const float* weight = p.weight + k * p.stride + c;
          const float x = g.x[k * g.count + r];
          for (int64_t i = k < deep ? tiles * kTile : 0; i < columns; ++i) out[i] += x * weight[i];
        }
      }
    }
  }
}

// e^x of numbers that are not positive; 0 under -87. (The polynomial is that of Cephes.)
Vector Exp(Vector x) {
  const Integers tiny = x < Vector{} - 87.0f;
  const Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded: no bits are left for more
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(tiny ? Vector{} : n, Integers) + 127) << 23;
  return tiny ? Vector{} : p * (Vector)power;
}

struct Attention {
  const float* q;     // [B, T, K, G, H]
  const float* k;     // [B, K, H, S]
  const float* v;     // [B, K, S, H]
  const uint8_t* mask;  // [B, T, S]
  float* out;         // [B, T, K, G, H]
  int64_t rows, heads, group, depth, slots;

  int64_t At(int64_t b, int64_t t, int64_t head) const {
    return ((b * rows + t) * heads + head) * group * depth;
  }
};

// The first slot behind all that any of the rows sees, in whole tiles: what lies beyond counts nothing.
int64_t Seen(const Attention& a, int64_t b, int64_t first, int64_t last) {
  int64_t seen = 0;
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* mask = a.mask + (b * a.rows + t) * a.slots;
    for (int64_t s = a.slots - kTile; s >= seen; s -= kTile) {
      if (std::any_of(mask + s, mask + s + kTile, [](uint8_t seen) { return seen != 0; })) {
        seen = s + kTile;
      }
    }
  }
  return seen;
}

// Scores [slots] become e^(score * scale - highest), 0 where a slot is hidden; returns their sum.
float Exponentials(float* scores, const uint8_t* mask, int64_t slots, float scale) {
  const Vector hidden = Vector{} - std::numeric_limits<float>::infinity();
  Vector highest = hidden;
  for (int64_t s = 0; s < slots; s += kLanes) {
    const Integers sees =
        __builtin_convertvector(*reinterpret_cast<const Bytes*>(mask + s), Integers) != 0;
    Vector& at = *reinterpret_cast<Vector*>(scores + s);
    at = sees ? at * scale : hidden;
    highest = at > highest ? at : highest;
  }
  float most = highest[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, highest[i]);
  if (most == hidden[0]) most = 0.0f;  // a row that sees nothing: all zeros
  Vector sum{};
  for (int64_t s = 0; s < slots; s += kLanes) {
    Vector& at = *reinterpret_cast<Vector*>(scores + s);
    at = Exp(at - most);
    sum += at;
  }
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

// One key head and the rows [first, last) of one text.
void Attend(const Attention& a, int64_t b, int64_t head, int64_t first, int64_t last) {
  const int64_t slots = Seen(a, b, first, last);
  const int64_t rows = (last - first) * a.group, of_row = a.group * a.depth;
  std::vector<float> q(rows * a.depth), scores(rows * slots), sums(rows), out(rows * a.depth);
  for (int64_t t = first; t < last; ++t) {
    const float* from = a.q + a.At(b, t, head);
    std::copy(from, from + of_row, q.data() + (t - first) * of_row);
  }
  const float* keys = a.k + (b * a.heads + head) * a.depth * a.slots;
  const float* values = a.v + (b * a.heads + head) * a.depth * a.slots;
  const Product seen{q.data(), keys, scores.data(), rows, a.depth, slots, a.slots};
  Columns(seen, Groups(seen), 0, slots);
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.depth));
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* mask = a.mask + (b * a.rows + first + r / a.group) * a.slots;
    sums[r] = Exponentials(scores.data() + r * slots, mask, slots, scale);
  }
  const Product mixed{scores.data(), values, out.data(), rows, slots, a.depth, a.depth};
  Columns(mixed, Groups(mixed), 0, a.depth);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = a.out + a.At(b, first + r / a.group, head) + r % a.group * a.depth;
    const float whole = sums[r] > 0.0f ? sums[r] : 1.0f;
    for (int64_t i = 0; i < a.depth; ++i) to[i] = out[r * a.depth + i] / whole;
  }
}

// Parts of some work that threads take until none is left. Helpers that come too late find none;
// nobody waits for a thread that has not begun, so threads that all wait cannot block each other.
struct Work {
  std::function<void(int64_t)> run;
  int64_t parts;
  std::atomic<int64_t> next{0}, done{0};

  void Take() {
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      run(part);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

void Share(ffi::ThreadPool& pool, int64_t threads, int64_t parts, std::function<void(int64_t)> run) {
  auto work = std::make_shared<Work>();
  work->run = std::move(run);
  work->parts = parts;
  for (int64_t helper = 1; helper < std::min(threads, parts); ++helper) {
    pool.Schedule([work] { work->Take(); });
  }
  work->Take();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < parts; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                   ffi::ResultBuffer<ffi::F32> out) {
  const auto rows = x.dimensions();
  const auto sides = weight.dimensions();
  if (rows.size() != 2 || sides.size() != 2 || rows[1] != sides[0] ||
      out->element_count() != static_cast<size_t>(rows[0] * sides[1])) {
    return ffi::Error::InvalidArgument("few_rows: wants [rows, depth] and [depth, width]");
  }
  const Product p{x.typed_data(), weight.typed_data(), out->typed_data(),
                  rows[0],        rows[1],             sides[1],         sides[1]};
  if (p.rows > kMostRows) return ffi::Error::InvalidArgument("few_rows: too many rows");
  if (p.rows == 0 || p.width == 0) return ffi::Error::Success();
  const bool small = p.depth * p.width < kShared;
  const int64_t threads = small ? 1 : std::max<int64_t>(1, pool.num_threads());
  const int64_t each = std::max<int64_t>(1, p.width / (threads * kPart));
  const int64_t tiles = (p.width + kTile - 1) / kTile;
  const int64_t parts = std::min(tiles, threads * each);
  const std::vector<Group> groups = Groups(p);
  Share(pool, threads, parts, [&](int64_t part) {
    const int64_t end = std::min(p.width, tiles * (part + 1) / parts * kTile);
    Columns(p, groups, tiles * part / parts * kTile, end);
  });
  return ffi::Error::Success();
}

ffi::Error AttendCached(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                        ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> layer,
                        ffi::Buffer<ffi::PRED> mask, ffi::ResultBuffer<ffi::F32> out) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_v = v.dimensions();
  const auto of_mask = mask.dimensions();
  if (of_q.size() != 5 || of_k.size() != 5 || of_v.size() != 5 || of_mask.size() != 3) {
    return ffi::Error::InvalidArgument("attend: wants q, k, v of five axes and a mask of three");
  }
  const int64_t batch = of_q[0], layers = of_k[0], number = *layer.typed_data();
  Attention a{q.typed_data(), k.typed_data(), v.typed_data(), nullptr, out->typed_data(),
              of_q[1],        of_q[2],        of_q[3],        of_q[4], of_k[4]};
  a.mask = reinterpret_cast<const uint8_t*>(mask.untyped_data());
  const bool same = of_k[1] == batch && of_v[1] == batch && of_mask[0] == batch &&
                    of_k[2] == a.heads && of_v[2] == a.heads && of_v[0] == layers &&
                    of_k[3] == a.depth && of_v[4] == a.depth && of_v[3] == a.slots &&
                    of_mask[1] == a.rows && of_mask[2] == a.slots;
  if (!same || a.slots % kTile != 0 || a.rows * a.group > kMostRows) {
    return ffi::Error::InvalidArgument("attend: shapes do not fit");
  }
  if (number < 0 || number >= layers) return ffi::Error::InvalidArgument("attend: no such layer");
  if (out->element_count() == 0) return ffi::Error::Success();
  const int64_t each = batch * a.heads * a.depth * a.slots;
  a.k += number * each;
  a.v += number * each;
  const bool small = a.rows * a.group * each < kAttended;
  const int64_t threads = small ? 1 : std::max<int64_t>(1, pool.num_threads());
  // Three key heads are too few for two threads: then each takes half of the rows.
  const int64_t texts = batch * a.heads;
  const int64_t splits = texts % threads != 0 && texts < 4 * threads ? std::min(a.rows, threads) : 1;
  Share(pool, threads, texts * splits, [&](int64_t part) {
    const int64_t text = part / splits, split = part % splits;
    Attend(a, text / a.heads, text % a.heads, a.rows * split / splits,
           a.rows * (split + 1) / splits);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MtdFewRows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MtdAttendCached, AttendCached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
