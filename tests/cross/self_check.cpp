// The portable CPU kernels against plain loops in double precision, without Python or torch: built
// for another architecture and run under an emulator (tests/cross/test_aarch64.py). Prints a line
// per check and returns the number of failures.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace llmkern;

namespace {

int failures = 0;

void report(const std::string& name, double error, double tolerance) {
  const bool ok = error <= tolerance;  // false for NaN
  failures += !ok;
  std::printf("%s %s: error %.2e, tolerance %.2e\n", ok ? "ok  " : "FAIL", name.c_str(), error,
              tolerance);
}

uint32_t random_word() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33);
}

// Multiples of 1/16 up to 4 in magnitude: exact in every dtype.
float random_value() { return float(int(random_word() % 129) - 64) / 16; }

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Values of `dtype` in memory; encodes only what is exact in it, as random_value is.
class Array {
 public:
  Array(size_t size, DType dtype) : dtype_(dtype), bytes_(size * width(), 0xff) {}
  Array(const std::vector<float>& values, DType dtype) : Array(values.size(), dtype) {
    for (size_t i = 0; i < values.size(); i++) put(i, values[i]);
  }
  void* data() { return bytes_.data(); }
  double operator[](size_t i) const {
    if (dtype_ == DType::kFloat32) return float_of(word<uint32_t>(i));
    const uint32_t half = word<uint16_t>(i);
    if (dtype_ == DType::kBFloat16) return float_of(half << 16);
    const int exponent = half >> 10 & 31;
    const double magnitude =
        exponent ? std::ldexp(1024 + (half & 1023), exponent - 25) : std::ldexp(half & 1023, -24);
    return exponent == 31 ? NAN : half >> 15 ? -magnitude : magnitude;
  }

 private:
  size_t width() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  template <typename T>
  T word(size_t i) const {
    T value;
    std::memcpy(&value, &bytes_[i * width()], sizeof(T));
    return value;
  }
  void put(size_t i, float value) {
    uint32_t bits = bits_of(value);
    if (dtype_ == DType::kBFloat16) bits >>= 16;
    if (dtype_ == DType::kFloat16)
      bits = value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10));
    std::memcpy(&bytes_[i * width()], &bits, width());
  }

  DType dtype_;
  std::vector<uint8_t> bytes_;
};

std::vector<float> random_values(size_t size) {
  std::vector<float> values(size);
  for (float& value : values) value = random_value();
  return values;
}

// 1/16 to 4 in steps of 1/16.
std::vector<float> random_scales(size_t size) {
  std::vector<float> values(size);
  for (float& value : values) value = float(1 + random_word() % 64) / 16;
  return values;
}

const char* name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// Rounding to the dtype, with room for sums in float32.
double tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kBFloat16 ? 4e-3 : 5e-4;
}

double relative_error(const Array& out, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); i++) {
    error += (out[i] - want[i]) * (out[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

const DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

struct Shape {
  int64_t N, K, group_size;
};
const Shape kShapes[] = {{70, 160, 32}, {33, 256, 128}, {1, 96, 96}, {130, 64, 64}};

// x [M, K] with rows one element longer, a bias, and the product x wᵀ + bias in double.
struct Product {
  int64_t M, N, K, stride;
  std::vector<float> x, bias;

  Product(int64_t M, int64_t N, int64_t K)
      : M(M), N(N), K(K), stride(K + 1), x(random_values(M * stride)), bias(random_values(N)) {}

  std::vector<double> with(const std::vector<double>& w, bool int8 = false) const {
    std::vector<double> y;
    for (int64_t m = 0; m < M; m++) {
      const float* row = &x[m * stride];
      float top = 0;
      for (int64_t k = 0; k < K; k++) top = std::fmax(top, std::fabs(row[k]));
      for (int64_t n = 0; n < N; n++) {
        double sum = bias[n];
        for (int64_t k = 0; k < K; k++) {
          const double rounded = double(std::nearbyint(row[k] * (127 / top))) * (top / 127);
          sum += (int8 ? rounded : row[k]) * w[n * K + k];
        }
        y.push_back(sum);
      }
    }
    return y;
  }
};

std::vector<uint8_t> random_codes(size_t size) {
  std::vector<uint8_t> codes(size);
  for (uint8_t& code : codes) code = random_word() % 16;
  return codes;
}

// Eight codes of a row in each word, the first in the lowest bits.
std::vector<uint32_t> pack_rows(const std::vector<uint8_t>& codes) {
  std::vector<uint32_t> words(codes.size() / 8);
  for (size_t i = 0; i < codes.size(); i++) words[i / 8] |= uint32_t(codes[i]) << (i % 8 * 4);
  return words;
}

// llmkern/formats/int4_cpu.py: blocks of 64 rows, quads of 4 columns.
std::vector<uint8_t> int4_cpu_layout(const std::vector<uint8_t>& codes, int64_t N, int64_t K) {
  std::vector<uint8_t> bytes((N + 63) / 64 * K * 32);
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < K; k++) {
      const int64_t row = n % 64, dword = row / 32 * 16 + row % 16;
      const int64_t at = n / 64 * K * 32 + k / 4 * 128 + dword * 4 + k % 4;
      bytes[at] |= codes[n * K + k] << (row / 16 % 2 * 4);
    }
  return bytes;
}

void check_int4(const Shape& shape, DType dtype, Layout layout, bool symmetric) {
  const auto [N, K, group_size] = shape;
  const int64_t groups = K / group_size;
  const bool cpu = layout == Layout::kCpu;
  const std::vector<uint8_t> codes = random_codes(N * K), centres = random_codes(N * groups);
  const std::vector<float> scales = random_scales(N * groups);
  std::vector<double> w(N * K);
  for (int64_t i = 0; i < N * K; i++) {
    const int64_t grid = i / group_size;
    w[i] = scales[grid] * (codes[i] - (symmetric ? 8 : centres[grid]));
  }
  const std::vector<uint32_t> words = pack_rows(codes);
  const std::vector<uint8_t> blocks = int4_cpu_layout(codes, N, K);
  std::vector<uint32_t> packed_zeros((N + 7) / 8 * groups);
  std::vector<uint8_t> zeros_by_group(N * groups);
  std::vector<float> scales_by_group(N * groups);
  for (int64_t n = 0; n < N; n++)
    for (int64_t g = 0; g < groups; g++) {
      packed_zeros[n / 8 * groups + g] |= uint32_t(centres[n * groups + g]) << (n % 8 * 4);
      zeros_by_group[g * N + n] = centres[n * groups + g];
      scales_by_group[g * N + n] = scales[n * groups + g];
    }
  Array stored(cpu ? scales_by_group : scales, dtype);
  const void* zeros = cpu ? static_cast<const void*>(zeros_by_group.data()) : packed_zeros.data();
  const Int4Weight weight = {cpu ? static_cast<const void*>(blocks.data()) : words.data(),
                             stored.data(),
                             symmetric ? nullptr : zeros,
                             N,
                             K,
                             group_size,
                             dtype,
                             layout};
  const std::string title = std::string(name(dtype)) + (cpu ? " cpu " : " canonical ") +
                            (symmetric ? "symmetric" : "zeros") + " N=" + std::to_string(N);
  Array dense(N * K, dtype);
  portable::dequantize_int4({weight, dense.data(), dtype});
  report("dequantize_int4 " + title, relative_error(dense, w), tolerance(dtype));
  for (int64_t M : {1, 3, 17})
    for (bool int8 : {false, true}) {
      const Product product(M, N, K);
      Array x(product.x, dtype), bias(product.bias, dtype), out(M * N, dtype);
      portable::w4a16_gemm(
          {x.data(), weight, bias.data(), out.data(), M, product.stride, dtype, int8});
      report("w4a16_gemm " + title + (int8 ? " int8" : "") + " M=" + std::to_string(M),
             relative_error(out, product.with(w, int8)), tolerance(dtype));
    }
}

// llmkern/formats/lut4_cpu.py: 16 + i above i in each unit of 32 columns.
std::vector<uint8_t> lut4_cpu_layout(const std::vector<uint8_t>& codes) {
  std::vector<uint8_t> bytes(codes.size() / 2);
  for (size_t unit = 0; unit < codes.size() / 32; unit++)
    for (int i = 0; i < 16; i++)
      bytes[unit * 16 + i] = codes[unit * 32 + 16 + i] << 4 | codes[unit * 32 + i];
  return bytes;
}

// One book, one per row, or one per group; the last without scales.
void check_lut4(const Shape& shape, DType dtype, Layout layout, int books) {
  const auto [N, K, group_size] = shape;
  const int64_t groups = K / group_size;
  const int64_t row_stride = books == 0 ? 0 : books == 1 ? 16 : 16 * groups;
  const int64_t group_stride = books == 2 ? 16 : 0;
  const std::vector<uint8_t> codes = random_codes(N * K);
  const std::vector<float> book = random_values(N * groups * 16);
  const std::vector<float> scales = random_scales(N * groups);
  std::vector<double> w(N * K);
  for (int64_t i = 0; i < N * K; i++) {
    const int64_t n = i / K, g = i % K / group_size;
    w[i] = double(book[n * row_stride + g * group_stride + codes[i]]) *
           (books == 2 ? 1.0 : scales[n * groups + g]);
  }
  const std::vector<uint32_t> words = pack_rows(codes);
  const std::vector<uint8_t> units = lut4_cpu_layout(codes);
  Array stored(scales, dtype);
  const bool cpu = layout == Layout::kCpu;
  const Lut4Weight weight = {cpu ? static_cast<const void*>(units.data()) : words.data(),
                             book.data(),
                             books == 2 ? nullptr : stored.data(),
                             N,
                             K,
                             group_size,
                             row_stride,
                             group_stride,
                             dtype,
                             layout};
  const std::string title = std::string(name(dtype)) + (cpu ? " cpu " : " canonical ") +
                            std::to_string(books) + " N=" + std::to_string(N);
  Array dense(N * K, dtype);
  portable::dequantize_lut4({weight, dense.data(), dtype});
  report("dequantize_lut4 " + title, relative_error(dense, w), tolerance(dtype));
  for (int64_t M : {1, 5, 18}) {
    const Product product(M, N, K);
    Array x(product.x, dtype), bias(product.bias, dtype), out(M * N, dtype);
    portable::lut4_gemm({x.data(), weight, bias.data(), out.data(), M, product.stride, dtype});
    report("lut4_gemm " + title + " M=" + std::to_string(M), relative_error(out, product.with(w)),
           tolerance(dtype));
  }
}

// Two of every 4 columns, as 4 bits of a group's metadata.
const uint32_t kNibbles[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};

// llmkern/formats/sparse24_cpu.py: blocks of 16 rows, words of metadata [word][row].
std::vector<uint32_t> blocked(const std::vector<uint32_t>& words, int64_t N) {
  const int64_t count = int64_t(words.size()) / N;
  std::vector<uint32_t> out(words.size());
  for (int64_t n = 0; n < N; n++)
    for (int64_t i = 0; i < count; i++)
      out[(n / 16 * count + i) * 16 + n % 16] = words[n * count + i];
  return out;
}

// A 2:4 weight of floats, or with groups of 32 of codes; N a multiple of 16 in the cpu layout.
void check_sparse24(int64_t N, int64_t K, DType dtype, bool cpu, bool zero_points) {
  const int64_t groups = K / 32;
  std::vector<uint32_t> meta(N * K / 32), codes(N * K / 16), shuffled(N * K / 16);
  std::vector<float> kept(N * K / 2), scales = random_scales(N * groups);
  std::vector<float> blocks(N * K / 2), scales_by_group(N * groups);
  std::vector<uint8_t> centres = random_codes(N * groups), zeros_by_group(N * groups);
  std::vector<uint32_t> zeros((N + 7) / 8 * groups);
  std::vector<double> w(N * K), w4(N * K);
  for (int64_t n = 0; n < N; n++)
    for (int64_t g = 0; g < groups; g++) {
      zeros[n / 8 * groups + g] |= uint32_t(centres[n * groups + g]) << (n % 8 * 4);
      zeros_by_group[g * N + n] = centres[n * groups + g];
      scales_by_group[g * N + n] = scales[n * groups + g];
    }
  for (int64_t i = 0; i < N * K / 2; i++) {
    const int64_t n = i / (K / 2), group = i / 2, at = i % 2;
    const int64_t column = group * 4;
    if (at == 0) meta[group / 8] |= kNibbles[random_word() % 6] << (group % 8 * 4);
    const int64_t k = column + (meta[group / 8] >> (group % 8 * 4 + 2 * at) & 3);
    const uint32_t code = random_word() % 16;
    kept[i] = random_value();
    codes[i / 8] |= code << (i % 8 * 4);
    shuffled[i / 8] |= code << ((i % 8 / 2 + 4 * at) * 4);
    w[k] = kept[i];
    w4[k] = scales[column / 32] * (int(code) - (zero_points ? centres[column / 32] : 8));
    const int64_t place = dtype == DType::kBFloat16 ? n % 16 * 2 + at : at * 16 + n % 16;
    if (cpu) blocks[(n / 16 * (K / 4) + group % (K / 4)) * 32 + place] = kept[i];
  }
  const Layout layout = cpu ? Layout::kCpu : Layout::kCanonical;
  const std::vector<uint32_t> meta_blocks = cpu ? blocked(meta, N) : meta;
  const std::vector<uint32_t> code_blocks = cpu ? blocked(shuffled, N) : codes;
  Array values(cpu ? blocks : kept, dtype), grid(cpu ? scales_by_group : scales, dtype);
  const void* points = cpu ? static_cast<const void*>(zeros_by_group.data()) : zeros.data();
  const std::string title = std::string(name(dtype)) + (cpu ? " cpu" : " canonical") +
                            (zero_points ? " zeros" : "") + " N=" + std::to_string(N);
  for (int64_t M : {1, 7}) {
    const Product product(M, N, K);
    Array x(product.x, dtype), bias(product.bias, dtype), out(M * N, dtype);
    portable::sparse24_gemm({x.data(), values.data(), meta_blocks.data(), bias.data(), out.data(),
                             M, N, K, product.stride, dtype, layout});
    report("sparse24_gemm " + title + " M=" + std::to_string(M),
           relative_error(out, product.with(w)), tolerance(dtype));
    portable::sparse24_w4a16_gemm({x.data(), code_blocks.data(), meta_blocks.data(), grid.data(),
                                   zero_points ? points : nullptr, bias.data(), out.data(), M, N, K,
                                   product.stride, 32, dtype, dtype, layout});
    report("sparse24_w4a16_gemm " + title + " M=" + std::to_string(M),
           relative_error(out, product.with(w4)), tolerance(dtype));
  }
}

void check_hessian_update(int64_t T, int64_t K, DType dtype) {
  const std::vector<float> values = random_values(T * K);
  Array x(values, dtype);
  std::vector<float> H(K * K, 0.5f);
  portable::hessian_update({H.data(), x.data(), T, K, 0.25, dtype});
  double error = 0, norm = 0;
  for (int64_t i = 0; i < K; i++)
    for (int64_t j = 0; j <= i; j++) {
      double want = 0.5;
      for (int64_t t = 0; t < T; t++) want += 0.25 * values[t * K + i] * values[t * K + j];
      error += (H[i * K + j] - want) * (H[i * K + j] - want);
      norm += want * want;
    }
  report(std::string("hessian_update ") + name(dtype) + " K=" + std::to_string(K),
         std::sqrt(error / norm), 1e-6);
}

// A damped Hessian of random inputs and its factor; then the column loop on it.
void check_factor_and_obs(int64_t N, int64_t K, int64_t group_size, bool dynamic) {
  const int64_t T = 2 * K, groups = K / group_size;
  const std::vector<float> x = random_values(T * K), w = random_values(N * K);
  std::vector<float> H(K * K), diagonal(K), U(K * K), d(K);
  for (int64_t i = 0; i < K; i++)
    for (int64_t j = 0; j <= i; j++)
      for (int64_t t = 0; t < T; t++) H[i * K + j] += x[t * K + i] * x[t * K + j] / T;
  for (int64_t i = 0; i < K; i++) diagonal[i] = H[i * K + i] + 0.1f;
  if (!portable::hessian_factor({H.data(), diagonal.data(), nullptr, U.data(), d.data(), K}))
    failures++;
  double error = 0, norm = 0;
  for (int64_t i = 0; i < K; i++)
    for (int64_t j = 0; j <= i; j++) {
      double sum = 0;
      for (int64_t k = i; k < K; k++) sum += double(U[i * K + k]) * d[k] * U[j * K + k] * d[k];
      const double want = i == j ? diagonal[i] : H[i * K + j];
      error += (sum - want) * (sum - want);
      norm += want * want;
    }
  report("hessian_factor K=" + std::to_string(K), std::sqrt(error / norm), 1e-5);

  const double top = 15;
  std::vector<int32_t> g_idx(K);
  for (int64_t k = 0; k < K; k++) g_idx[k] = int32_t(k / group_size);
  std::vector<float> scales(N * groups, 0.5f), zeros(N * groups, 7), w_hat(N * K), loss(N);
  std::vector<uint8_t> codes(N * K);
  portable::obs_quantize({w.data(), U.data(), d.data(), g_idx.data(), codes.data(), scales.data(),
                          zeros.data(), w_hat.data(), loss.data(), N, K, group_size, 4, dynamic,
                          /*symmetric=*/false, /*clip_search=*/dynamic, DType::kFloat32});
  double off_grid = 0, off_code = 0, off_loss = 0;
  for (int64_t n = 0; n < N; n++) {
    double want_loss = 0;
    for (int64_t k = 0; k < K; k++) {
      const int64_t at = n * K + k, grid = n * groups + g_idx[k];
      double updated = w[at];
      for (int64_t j = 0; j < k; j++)
        updated += (double(w[n * K + j]) - w_hat[n * K + j]) * U[j * K + k];
      // The code is the nearest of 0..15 up to what rounding in float32 may decide otherwise.
      const double place = std::fmin(top, std::fmax(0, updated / scales[grid] + zeros[grid]));
      off_code = std::fmax(off_code, std::fabs(place - codes[at]) - 0.5);
      off_grid = std::fmax(off_grid,
                           std::fabs(w_hat[at] - double(scales[grid]) * (codes[at] - zeros[grid])));
      want_loss += (updated - w_hat[at]) * d[k] * (updated - w_hat[at]) * d[k];
    }
    off_loss = std::fmax(off_loss, std::fabs(loss[n] - want_loss) / want_loss);
  }
  const std::string title = std::string("obs_quantize ") + (dynamic ? "dynamic " : "static ");
  report(title + "codes", off_code, 1e-4);
  report(title + "w_hat", off_grid, 1e-5);
  report(title + "loss", off_loss, 1e-4);
}

// A mask chosen by columns of four, or over all rows, what is kept rounded or not: the numbers that
// must go do, are zero, and the loss is that of the errors.
void check_prune(int64_t N, int64_t K, bool of_every, bool rounds) {
  const std::vector<float> w = random_values(N * K);
  std::vector<float> U = random_values(K * K), d(K, 1.5f), scales(N), zeros(N), w_hat(N * K),
                     loss(N);
  for (float& u : U) u *= 0.1f;
  std::vector<int32_t> g_idx(K);
  std::vector<uint8_t> codes(N * K), kept(N * K);
  portable::obs_prune(
      {{w.data(), U.data(), d.data(), g_idx.data(), rounds ? codes.data() : nullptr, scales.data(),
        zeros.data(), w_hat.data(), loss.data(), N, K, K, 4,
        /*dynamic=*/true, /*symmetric=*/false, /*clip_search=*/false, DType::kFloat32},
       kept.data(),
       0.5,
       /*per_row=*/false,
       of_every ? 2 : 0,
       of_every ? 4 : 0});
  double wrong = 0, off_loss = 0;
  int64_t count = 0;
  for (int64_t n = 0; n < N; n++) {
    double want_loss = 0;
    for (int64_t k = 0; k < K; k++) {
      const int64_t at = n * K + k;
      count += kept[at];
      wrong += !kept[at] && w_hat[at] != 0;
      if (of_every && k % 4 == 3)
        wrong += kept[at - 3] + kept[at - 2] + kept[at - 1] + kept[at] != 2;
      if (rounds && kept[at])
        wrong += std::fabs(w_hat[at] - scales[n] * (codes[at] - zeros[n])) > 1e-5;
      double updated = w[at];
      for (int64_t j = 0; j < k; j++)
        updated += (double(w[n * K + j]) - w_hat[n * K + j]) * U[j * K + k];
      if (!rounds && kept[at]) wrong += std::fabs(updated - w_hat[at]) > 1e-4;
      want_loss += (updated - w_hat[at]) * d[k] * (updated - w_hat[at]) * d[k];
    }
    off_loss = std::fmax(off_loss, std::fabs(loss[n] - want_loss) / want_loss);
  }
  const std::string title = std::string("obs_prune ") + (of_every ? "2:4 " : "half ");
  report(title + "mask", wrong + std::fabs(double(count) - double(N * K / 2)), 0);
  report(title + "loss", off_loss, 1e-4);
}

}  // namespace

int main() {
  for (DType dtype : kDTypes) {
    for (const Shape& shape : kShapes) {
      for (Layout layout : {Layout::kCanonical, Layout::kCpu})
        for (bool symmetric : {false, true}) check_int4(shape, dtype, layout, symmetric);
      for (Layout layout : {Layout::kCanonical, Layout::kCpu})
        for (int books : {0, 1, 2}) check_lut4(shape, dtype, layout, books);
    }
    for (bool zero_points : {false, true}) {
      for (bool cpu : {false, true}) check_sparse24(48, 192, dtype, cpu, zero_points);
      check_sparse24(21, 160, dtype, false, zero_points);
    }
    for (int64_t K : {1, 33, 130}) check_hessian_update(70, K, dtype);
  }
  for (bool dynamic : {false, true}) check_factor_and_obs(5, 96, 32, dynamic);
  for (bool of_every : {false, true})
    for (bool rounds : {false, true}) check_prune(50, 96, of_every, rounds);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
