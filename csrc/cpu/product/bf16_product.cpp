#include "irlfast/bf16_product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "irlfast/huge_pages.h"
#include "isa/bf16_tiles.h"
#include "parallel.h"

namespace irlfast {

bool bf16_product_available() {
#ifdef IRLFAST_HAVE_AVX512_BF16
  static const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                __builtin_cpu_supports("avx512bf16");
  return available;
#else
  return false;
#endif
}

#ifdef IRLFAST_HAVE_AVX512_BF16
namespace {

// The depth is cut into blocks of at most this many, whose packed panels of A and B take about 2 and 4 MiB at most.
// Long, as each block reads and writes all results again.
constexpr int64_t kDepth = 1024, kPanelRows = 1024, kPanelColumns = 2048;

// bfloat16 results of several blocks are summed in float32 beside smaller panels, 2.25 MiB of sums at most.
constexpr int64_t kSumRows = 768, kSumColumns = 768;

// What a thread takes at a time: its rows of A, packed, stay in the second-level cache. Packing wants whole cache lines
// where neighbours are adjacent, and whole tiles.
constexpr int64_t kTaskRows = 192, kTaskColumns = 256;
constexpr int64_t kPackRows = 192, kPackColumns = 128;

// Below this many multiplications a team of threads costs more than it saves.
constexpr int64_t kSerial = int64_t(1) << 20;

constexpr int64_t divide_up(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

// [0, size) in the fewest parts of at most `most`, all but the last of one length, a multiple of `unit`.
struct Parts {
  Parts(int64_t size, int64_t most, int64_t unit) : size(size) {
    length = divide_up(divide_up(size, divide_up(size, most)), unit) * unit;
    count = divide_up(size, length);
  }
  int64_t begin(int64_t part) const { return part * length; }
  int64_t extent(int64_t part) const { return std::min(length, size - begin(part)); }
  int64_t size, length, count;
};

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  char* reserve(int64_t bytes) {
    if (bytes <= bytes_) return data_;
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
    // Aligned to huge pages, so that the packed panels take few entries of the address cache.
    void* data = nullptr;
    if (posix_memalign(&data, size_t(2) << 20, size_t(bytes)) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(data);
    bytes_ = bytes;
    advise_huge_pages(data_, bytes);
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

thread_local Scratch scratch;

class Product {
 public:
  Product(const Bf16Product& p, int threads)
      : p_(p),
        threads_(p.rows * p.columns * p.depth < kSerial ? 1 : threads),
        depths_(p.depth, kDepth, 2 * kLinePairs),
        sums_(p.out_bf16 && depths_.count > 1),
        row_panels_(p.rows, sums_ ? kSumRows : kPanelRows, kTileRows),
        column_panels_(p.columns, sums_ ? kSumColumns : kPanelColumns, kTileColumns) {
    const int64_t depth = packed_row_words(depths_.length);
    const int64_t row_words = divide_up(row_panels_.length, kTileRows) * kTileRows * depth;
    const int64_t column_words = column_panels_.length * depth;
    const int64_t sum_words = sums_ ? row_panels_.length * column_panels_.length : 0;
    packed_columns_ = reinterpret_cast<uint32_t*>(scratch.reserve((row_words + column_words + sum_words) * 4));
    packed_rows_ = packed_columns_ + column_words;
    sum_ = reinterpret_cast<float*>(packed_rows_ + row_words);
  }

  void run() {
    for (int64_t column_panel = 0; column_panel < column_panels_.count; ++column_panel) {
      for (int64_t row_panel = 0; row_panel < row_panels_.count; ++row_panel) {
        for (int64_t block = 0; block < depths_.count; ++block) {
          pack(row_panel, column_panel, block);
          multiply(row_panel, column_panel, block);
        }
      }
    }
  }

 private:
  // Packs what the step before has not left packed.
  void pack(int64_t row_panel, int64_t column_panel, int64_t block) {
    const int64_t first_row = row_panels_.begin(row_panel), rows = row_panels_.extent(row_panel);
    const int64_t first_column = column_panels_.begin(column_panel), columns = column_panels_.extent(column_panel);
    const int64_t begin = depths_.begin(block), depth = depths_.extent(block);
    const bool same_block = block == packed_block_;
    const int64_t row_tasks = same_block && row_panel == packed_row_panel_ ? 0 : divide_up(rows, kPackRows);
    const int64_t column_tasks =
        same_block && column_panel == packed_column_panel_ ? 0 : divide_up(columns, kPackColumns);
    parallel_for(row_tasks + column_tasks, 1, threads_, [&](int64_t task) {
      if (task < row_tasks) {
        const int64_t row = task * kPackRows;
        const auto* data = static_cast<const uint16_t*>(p_.a.data);
        pack_bf16_rows({data + (first_row + row) * p_.a.row_stride + begin * p_.a.column_stride, p_.a.row_stride,
                        p_.a.column_stride},
                       std::min(kPackRows, rows - row), depth, packed_rows_ + row * packed_row_words(depth));
      } else {
        const int64_t column = (task - row_tasks) * kPackColumns;
        const auto* data = static_cast<const uint16_t*>(p_.b.data);
        pack_bf16_columns({data + (first_column + column) * p_.b.column_stride + begin * p_.b.row_stride,
                           p_.b.column_stride, p_.b.row_stride},
                          std::min(kPackColumns, columns - column), depth,
                          packed_columns_ + column * packed_pairs(depth));
      }
    });
    packed_row_panel_ = row_panel;
    packed_column_panel_ = column_panel;
    packed_block_ = block;
  }

  void multiply(int64_t row_panel, int64_t column_panel, int64_t block) {
    const int64_t depth = depths_.extent(block);
    const int64_t first_row = row_panels_.begin(row_panel), first_column = column_panels_.begin(column_panel);
    const int64_t element_bytes = p_.out_bf16 ? 2 : 4;
    const TileMatrix out{static_cast<char*>(p_.out) + (first_row * p_.out_stride + first_column) * element_bytes,
                         p_.out_stride, p_.out_bf16};
    const TileMatrix sum = sums_ ? TileMatrix{sum_, column_panels_.length, false} : out;
    const TileMatrix none{nullptr, 0, false};
    const TileMatrix addend = block > 0 ? sum : p_.accumulate ? out : none;
    const TileMatrix result = block + 1 < depths_.count ? sum : out;

    const Parts rows(row_panels_.extent(row_panel), kTaskRows, kTileRows);
    const int64_t panel_columns = column_panels_.extent(column_panel);
    // At least four tasks a thread, so that none waits long for the last.
    const int64_t splits = divide_up(4 * threads_, rows.count);
    const Parts columns(panel_columns, std::min(kTaskColumns, divide_up(panel_columns, splits)), kTileColumns);
    parallel_for(rows.count * columns.count, 1, threads_, [&](int64_t task) {
      const int64_t row = rows.begin(task % rows.count), column = columns.begin(task / rows.count);
      const int64_t end_row = row + rows.extent(task % rows.count);
      const int64_t end_column = column + columns.extent(task / rows.count);
      for (int64_t j = column; j < end_column; j += kTileColumns) {
        for (int64_t i = row; i < end_row; i += kTileRows) {
          bf16_tile(packed_rows_ + i * packed_row_words(depth), packed_columns_ + j * packed_pairs(depth), depth,
                    std::min(kTileRows, end_row - i), std::min(kTileColumns, end_column - j), at(addend, i, j),
                    at(result, i, j));
        }
      }
    });
  }

  static TileMatrix at(const TileMatrix& x, int64_t row, int64_t column) {
    if (x.data == nullptr) return x;
    return {static_cast<char*>(x.data) + (row * x.stride + column) * (x.bf16 ? 2 : 4), x.stride, x.bf16};
  }

  const Bf16Product& p_;
  int threads_;
  Parts depths_;
  bool sums_;
  Parts row_panels_, column_panels_;
  uint32_t *packed_rows_, *packed_columns_;
  float* sum_;
  int64_t packed_row_panel_ = -1, packed_column_panel_ = -1, packed_block_ = -1;
};

}  // namespace

void bf16_product(const Bf16Product& product, int threads) {
  if (product.rows == 0 || product.columns == 0) return;
  if (product.depth == 0) {
    if (product.accumulate) return;
    const size_t bytes = size_t(product.columns) * (product.out_bf16 ? 2 : 4);
    for (int64_t row = 0; row < product.rows; ++row) {
      std::memset(static_cast<char*>(product.out) + row * product.out_stride * (product.out_bf16 ? 2 : 4), 0, bytes);
    }
    return;
  }
  Product(product, threads).run();
}
#else
void bf16_product(const Bf16Product&, int) {
  throw std::runtime_error("bf16_product is not built in: the compiler has no AVX512_BF16");
}
#endif

}  // namespace irlfast
