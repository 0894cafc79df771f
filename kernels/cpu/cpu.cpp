// The compiled part of the CPU's path: GELU and the norms of adaln.py in bf16, the adaLN projection, transposes, AdamW.
// Each is one pass over memory. compiled.py builds and calls it.
//
// Arithmetic is fp32. Work is cut into pieces that do not depend on the number of threads, and each piece adds up its
// sums in a fixed order. A result therefore has the same bits on one thread and on many.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512")
#endif

typedef uint16_t bf16;

static inline float wide(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline bf16 narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : bf16(rounded);
}

static inline float wide(float value) { return value; }
static inline void store(float *at, float value) { *at = value; }
static inline void store(bf16 *at, float value) { *at = narrow(value); }

// e^x for |x| < 88, to a few ulp: 2^n·e^r with |r| <= ln(2)/2 and ln(2) in two parts; Taylor's polynomial of e^r.
static inline float exponential(float x) {
  const float magic = 12582912.f;  // 1.5·2^23: adding it rounds to an integer, found in the low bits
  float shifted = x * 1.44269504f + magic;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  float n = shifted - magic, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1 / 5040.f;
  p = p * r + 1 / 720.f;
  p = p * r + 1 / 120.f;
  p = p * r + 1 / 24.f;
  p = p * r + 1 / 6.f;
  p = p * r + 1 / 2.f;
  p = p * r + 1;
  p = p * r + 1;
  uint32_t power_bits = (bits << 23) + 0x3f800000;
  float power;
  memcpy(&power, &power_bits, 4);
  return p * power;
}

// With v = 2·√(2/π)·(x + 0.044715·x³) and σ = 1/(1 + e⁻ᵛ): gelu(x) = x/2·(1 + tanh(v/2)) = x·σ.
const float GELU_1 = 1.5957691216057308f, GELU_3 = 0.07135481282804842f;
const float GELU_FAR = 10.f;  // for |x| >= 10, σ is 0 or 1 to fp32's precision; at 10 e⁻ᵛ does not overflow

// Compares bits: compilers turn a comparison of floats into a branch that meets denormals.
static inline float clamped(float x) {
  const uint32_t SIGN = 0x80000000, far = 0x41200000;  // 10.f
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t size = bits & ~SIGN;
  bits = (bits & SIGN) | (size < far ? size : far);
  memcpy(&x, &bits, 4);
  return x;
}

static inline float gelu_sigmoid(float x) {
  float near = clamped(x), sigmoid = 1 / (1 + exponential(-near * (GELU_1 + GELU_3 * near * near)));
  return x < -GELU_FAR ? 0 : sigmoid;
}

// Results go through a buffer on the stack: a store delays later loads from the same offset in another page.
extern "C" void gelu(const bf16 *x, bf16 *y, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < n; start += TILE) {
    bf16 out[TILE];
    int size = n - start < TILE ? int(n - start) : TILE;
#pragma omp simd
    for (int i = 0; i < size; i++) {
      float value = wide(x[start + i]);
      out[i] = narrow(value * gelu_sigmoid(value));
    }
    memcpy(y + start, out, size * sizeof(bf16));
  }
}

// Recomputes y = gelu(x), and sets dx = gelu'(x)·dx in place.
extern "C" void gelu_backward(const bf16 *x, bf16 *dx, bf16 *y, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < n; start += TILE) {
    bf16 out[TILE], gradient[TILE];
    int size = n - start < TILE ? int(n - start) : TILE;
#pragma omp simd
    for (int i = 0; i < size; i++) {
      float value = wide(x[start + i]), near = clamped(value);
      float sigmoid = gelu_sigmoid(value), activation = value * sigmoid;
      float slope = sigmoid + activation * (1 - sigmoid) * (GELU_1 + 3 * GELU_3 * near * near);
      out[i] = narrow(activation);
      gradient[i] = narrow(slope * wide(dx[start + i]));
    }
    memcpy(y + start, out, size * sizeof(bf16));
    memcpy(dx + start, gradient, size * sizeof(bf16));
  }
}

struct Chunk {
  int32_t start, stop, row;  // tokens, and their row of the tables
};

// r = x + gate·h, or x itself if h is null; y = (r - mean)·rstd·alpha + beta. Tables are [R, D] with a row stride.
extern "C" void layer_norm(
    const bf16 *x, const bf16 *h, const float *gate, const float *alpha, const float *beta, int64_t stride_gate,
    int64_t stride_alpha, int64_t stride_beta, const Chunk *chunks, int64_t num_chunks, int64_t D, float eps, bf16 *r,
    bf16 *y, float *mean, float *rstd) {
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < num_chunks; c++) {
    const float *gate_row = gate + chunks[c].row * stride_gate;
    const float *alpha_row = alpha + chunks[c].row * stride_alpha, *beta_row = beta + chunks[c].row * stride_beta;
    float values[D];
    for (int64_t token = chunks[c].start; token < chunks[c].stop; token++) {
      const bf16 *x_row = x + token * D, *h_row = h + token * D;
      bf16 *r_row = r + token * D, *y_row = y + token * D;
      float sum = 0, squares = 0;
      if (h) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < D; i++) {
          r_row[i] = narrow(wide(x_row[i]) + gate_row[i] * wide(h_row[i]));
          values[i] = wide(r_row[i]);
          sum += values[i];
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < D; i++) {
          values[i] = wide(x_row[i]);
          sum += values[i];
        }
      }
      float m = sum / D;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < D; i++) squares += (values[i] - m) * (values[i] - m);
      float s = 1 / std::sqrt(squares / D + eps);
#pragma omp simd
      for (int64_t i = 0; i < D; i++) y_row[i] = narrow((values[i] - m) * s * alpha_row[i] + beta_row[i]);
      mean[token] = m;
      rstd[token] = s;
    }
  }
}

// With x̂ = (r - mean)·rstd and g = dy·alpha: dx = dr + rstd·(g - mean(g) - x̂·mean(g·x̂)) and dh = gate·dx.
// Each chunk's sums [3, D] are those of dy·x̂, dy and dx·h. Without h there is no dr, dh or third sum.
extern "C" void layer_norm_backward(
    const bf16 *dr, const bf16 *dy, const bf16 *r, const bf16 *h, const float *gate, const float *alpha,
    int64_t stride_gate, int64_t stride_alpha, const float *mean, const float *rstd, const Chunk *chunks,
    int64_t num_chunks, int64_t D, bf16 *dx, bf16 *dh, float *sums) {
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < num_chunks; c++) {
    const float *gate_row = gate + chunks[c].row * stride_gate, *alpha_row = alpha + chunks[c].row * stride_alpha;
    float *dalpha = sums + 3 * c * D, *dbeta = dalpha + D, *dgate = dbeta + D;
    float normed[D], g[D];
    memset(dalpha, 0, 3 * D * sizeof(float));
    for (int64_t token = chunks[c].start; token < chunks[c].stop; token++) {
      const bf16 *dr_row = dr + token * D, *dy_row = dy + token * D, *r_row = r + token * D, *h_row = h + token * D;
      bf16 *dx_row = dx + token * D, *dh_row = dh + token * D;
      float m = mean[token], s = rstd[token], sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t i = 0; i < D; i++) {
        float upstream = wide(dy_row[i]);
        normed[i] = (wide(r_row[i]) - m) * s;
        g[i] = upstream * alpha_row[i];
        sum += g[i];
        dot += g[i] * normed[i];
        dalpha[i] += upstream * normed[i];
        dbeta[i] += upstream;
      }
      sum /= D;
      dot /= D;
      if (h) {
#pragma omp simd
        for (int64_t i = 0; i < D; i++) {
          float gradient = wide(dr_row[i]) + s * (g[i] - sum - normed[i] * dot);
          dx_row[i] = narrow(gradient);
          dh_row[i] = narrow(gradient * gate_row[i]);
          dgate[i] += gradient * wide(h_row[i]);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < D; i++) dx_row[i] = narrow(s * (g[i] - sum - normed[i] * dot));
      }
    }
  }
}

// For compilers that do not keep an inner loop over GROUP rows in registers.
const int LANES = 16, GROUP = 4;
typedef float Lanes __attribute__((vector_size(4 * LANES)));

static inline Lanes lanes(const float *at) {
  Lanes values;
  memcpy(&values, at, sizeof values);
  return values;
}

// y [R, O] = x·wᵀ + b for few rows x [R, I]: one read of the large w [O, I].
extern "C" void few_rows(
    const float *x, const float *weight, const float *bias, int64_t R, int64_t O, int64_t I, float *y) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < O; start += GROUP) {
    int64_t last = O - 1 - start;  // a last group of fewer rows repeats the last row
    for (int64_t r = 0; r < R; r++) {
      const float *x_row = x + r * I, *w[GROUP];
      Lanes partial[GROUP] = {};
      for (int k = 0; k < GROUP; k++) w[k] = weight + (start + (k < last ? k : last)) * I;
      int64_t i = 0;
      for (; i + LANES <= I; i += LANES)
        for (int k = 0; k < GROUP; k++) partial[k] += lanes(x_row + i) * lanes(w[k] + i);
      for (int k = 0; k < GROUP && k <= last; k++) {
        float sum = bias[start + k];
        for (int lane = 0; lane < LANES; lane++) sum += partial[k][lane];
        for (int64_t rest = i; rest < I; rest++) sum += x_row[rest] * w[k][rest];
        y[r * O + start + k] = sum;
      }
    }
  }
}

// dweight = dyᵀ·x, and dx = dy·w as a sum [R, I] for each slice of SLICE outputs.
template <typename Gradient>
static void few_rows_gradients(
    const float *x, const float *weight, const float *dy, int64_t R, int64_t O, int64_t I, float *dx,
    Gradient *dweight) {
#pragma omp parallel for schedule(static)
  for (int64_t slice = 0; slice < O; slice += SLICE) {
    float *dx_slice = dx + slice / SLICE * R * I, gradient[I];
    memset(dx_slice, 0, R * I * sizeof(float));
    for (int64_t start = slice; start < O && start < slice + SLICE; start += GROUP) {
      int64_t last = O - 1 - start;
      const float *w[GROUP];
      for (int k = 0; k < GROUP; k++) w[k] = weight + (start + (k < last ? k : last)) * I;
      for (int64_t r = 0; r < R; r++) {
        float *dx_row = dx_slice + r * I, upstream[GROUP];
        for (int k = 0; k < GROUP; k++) upstream[k] = k <= last ? dy[r * O + start + k] : 0;
        int64_t i = 0;
        for (; i + LANES <= I; i += LANES) {
          Lanes sum = lanes(dx_row + i);
          for (int k = 0; k < GROUP; k++) sum += upstream[k] * lanes(w[k] + i);
          memcpy(dx_row + i, &sum, sizeof sum);
        }
        for (; i < I; i++)
          for (int k = 0; k < GROUP; k++) dx_row[i] += upstream[k] * w[k][i];
      }
      for (int64_t o = start; o <= start + last && o < start + GROUP; o++) {
        int64_t i = 0;
        for (; i + LANES <= I; i += LANES) {
          Lanes sum = {};
          for (int64_t r = 0; r < R; r++) sum += dy[r * O + o] * lanes(x + r * I + i);
          memcpy(gradient + i, &sum, sizeof sum);
        }
        for (; i < I; i++) {
          gradient[i] = 0;
          for (int64_t r = 0; r < R; r++) gradient[i] += dy[r * O + o] * x[r * I + i];
        }
#pragma omp simd
        for (i = 0; i < I; i++) store(dweight + o * I + i, gradient[i]);
      }
    }
  }
}

extern "C" void few_rows_backward(
    const float *x, const float *weight, const float *dy, int64_t R, int64_t O, int64_t I, float *dx, void *dweight,
    int64_t is_bf16) {
  if (is_bf16)
    few_rows_gradients(x, weight, dy, R, O, I, dx, (bf16 *)dweight);
  else
    few_rows_gradients(x, weight, dy, R, O, I, dx, (float *)dweight);
}

const int SQUARE = 32;  // side of a block held in registers; one of its rows is a cache line

// y [cols, rows] of x [rows, cols], at most SQUARE each.
static inline void turn(const bf16 *x, int64_t x_stride, int rows, int cols, bf16 *y, int64_t y_stride) {
#ifdef __AVX512BW__
  __m512i a[SQUARE], b[SQUARE];
  __mmask32 read = 0xffffffffu >> (SQUARE - cols), written = 0xffffffffu >> (SQUARE - rows);
  for (int i = 0; i < SQUARE; i++)
    a[i] = i < rows ? _mm512_maskz_loadu_epi16(read, x + i * x_stride) : _mm512_setzero_si512();
  // For eight rows at a time, transpose the 8 x 8 blocks within groups of eight lanes: swap 16, 32, then 64 bits.
  for (int i = 0; i < SQUARE; i += 2) {
    b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
  }
  for (int i = 0; i < SQUARE; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi32(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi32(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < SQUARE; i += 8)
    for (int j = 0; j < 4; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 4]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 4]);
    }
  // b[8g + k] now holds in group of lanes l the rows 8g.. of column 8l + k. Next the groups of lanes change places.
  for (int k = 0; k < 8; k++) {
    __m512i even0 = _mm512_shuffle_i32x4(b[k], b[k + 8], 0x88), odd0 = _mm512_shuffle_i32x4(b[k], b[k + 8], 0xdd);
    __m512i even1 = _mm512_shuffle_i32x4(b[k + 16], b[k + 24], 0x88);
    __m512i odd1 = _mm512_shuffle_i32x4(b[k + 16], b[k + 24], 0xdd);
    a[k] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    a[k + 8] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    a[k + 16] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    a[k + 24] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
  for (int j = 0; j < SQUARE; j++)
    if (j < cols) _mm512_mask_storeu_epi16(y + j * y_stride, written, a[j]);
#else
  bf16 block[SQUARE][SQUARE];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) block[j][i] = x[i * x_stride + j];
  for (int j = 0; j < cols; j++) memcpy(y + j * y_stride, block[j], rows * sizeof(bf16));
#endif
}

// y [cols, rows] of x [rows, cols], in pieces that touch few pages: no processor prefetches lines of so many rows.
extern "C" void transpose(const bf16 *x, int64_t rows, int64_t cols, bf16 *y) {
  const int64_t PIECE = 8 * SQUARE;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t top = 0; top < rows; top += PIECE)
    for (int64_t left = 0; left < cols; left += PIECE)
      for (int64_t j = left; j < cols && j < left + PIECE; j += SQUARE)
        for (int64_t i = top; i < rows && i < top + PIECE; i += SQUARE) {
          int height = rows - i < SQUARE ? int(rows - i) : SQUARE, width = cols - j < SQUARE ? int(cols - j) : SQUARE;
          for (int k = 0; k < SQUARE; k++) __builtin_prefetch(x + (i + k) * cols + j + SQUARE);
          turn(x + i * cols + j, cols, height, width, y + j * rows + i, rows);
        }
}

struct Parameter {
  float *weight;
  const void *gradient;
  float *average, *square;
  int64_t n;
};

struct Rate {
  float step, correction;
};

// Called within a parallel region, as is square_tiles.
template <typename Gradient>
static void adamw_step(
    const Parameter &p, Rate rate, float scale, float decay, float beta1, float beta2, float eps) {
  const Gradient *gradient = (const Gradient *)p.gradient;
  float *weight = p.weight, *average = p.average, *square = p.square;
#pragma omp for simd schedule(static) nowait
  for (int64_t i = 0; i < p.n; i++) {
    float g = wide(gradient[i]) * scale;
    float m = average[i] + (g - average[i]) * (1 - beta1);
    float v = square[i] * beta2 + g * g * (1 - beta2);
    average[i] = m;
    square[i] = v;
    weight[i] = weight[i] * decay - rate.step * m / (std::sqrt(v) * rate.correction + eps);
  }
}

// weight = weight·decay - rate·m / (√v·correction + eps), where m and v are the moments of scale·gradient.
extern "C" void adamw(
    const Parameter *parameters, int64_t count, const bool *is_bf16, const Rate *rates, float scale, float decay,
    float beta1, float beta2, float eps) {
#pragma omp parallel
  for (int64_t k = 0; k < count; k++)
    if (is_bf16[k])
      adamw_step<bf16>(parameters[k], rates[k], scale, decay, beta1, beta2, eps);
    else
      adamw_step<float>(parameters[k], rates[k], scale, decay, beta1, beta2, eps);
}

struct Values {
  const void *data;
  int64_t n;
};

template <typename Value>
static void square_tiles(const Value *x, int64_t n, float *sums) {
#pragma omp for schedule(static) nowait
  for (int64_t start = 0; start < n; start += TILE) {
    int size = n - start < TILE ? int(n - start) : TILE;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < size; i++) sum += wide(x[start + i]) * wide(x[start + i]);
    sums[start / TILE] = sum;
  }
}

// For each tile of some tensors, the sum of squares.
extern "C" void squares(const Values *tensors, int64_t count, const bool *is_bf16, float *sums) {
#pragma omp parallel
  for (int64_t k = 0, tile = 0; k < count; tile += (tensors[k++].n + TILE - 1) / TILE)
    if (is_bf16[k])
      square_tiles((const bf16 *)tensors[k].data, tensors[k].n, sums + tile);
    else
      square_tiles((const float *)tensors[k].data, tensors[k].n, sums + tile);
}
