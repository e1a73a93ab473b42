// Small matrix products C [m, n] = A [m, k] B [k, n] in float, with B packed by groups of 16 columns.
//
// float: B [n / 16][k][16]. bf16, if the CPU has a dot product of pairs: B [n / 16][k / 2][16][2], and A is bf16 too.
#pragma once

#include "simd.h"

constexpr int TILE_ROWS = 6;

template <class T>
struct Packed {  // of B; strides in elements
  const T* data;
  int64_t group, row;  // row: of one k (float) or of two (bf16)
};

template <int ROWS, int GROUPS>
static inline void tile(const float* a, int64_t lda, Packed<float> b, int k, float* c, int64_t ldc, bool add) {
  constexpr int N = GROUPS * VECTORS;
  vfloat sum[ROWS][N];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = add ? load(c + m * ldc + n * WIDTH) : vfloat{};
  for (int i = 0; i < k; ++i) {
    vfloat column[N];
    for (int n = 0; n < N; ++n)
      column[n] = load(b.data + (n / VECTORS) * b.group + i * b.row + (n % VECTORS) * WIDTH);
    for (int m = 0; m < ROWS; ++m) {
      vfloat value = splat(a[m * lda + i]);
      for (int n = 0; n < N; ++n) sum[m][n] += value * column[n];
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < N; ++n) store(c + m * ldc + n * WIDTH, sum[m][n]);
}

#if HAS_BF16_DOT
template <int ROWS, int GROUPS>
static inline void tile(const bf16* a, int64_t lda, Packed<bf16> b, int k, float* c, int64_t ldc, bool add) {
  static_assert(VECTORS == 1, "the dot product of pairs comes with AVX-512");
  __m512 sum[ROWS][GROUPS];
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < GROUPS; ++n)
      sum[m][n] = add ? _mm512_loadu_ps(c + m * ldc + n * GROUP) : _mm512_setzero_ps();
  for (int i = 0; i < k / 2; ++i) {
    __m512bh column[GROUPS];
    for (int n = 0; n < GROUPS; ++n) column[n] = (__m512bh)_mm512_loadu_si512(b.data + n * b.group + i * b.row);
    for (int m = 0; m < ROWS; ++m) {
      __m512bh value = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(a + m * lda + 2 * i));
      for (int n = 0; n < GROUPS; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], value, column[n]);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < GROUPS; ++n) _mm512_storeu_ps(c + m * ldc + n * GROUP, sum[m][n]);
}
#endif

template <int ROWS, class T>
static inline void columns(const T* a, int64_t lda, Packed<T> b, int groups, int k, float* c, int64_t ldc, bool add) {
  for (; groups >= TILE_GROUPS; groups -= TILE_GROUPS) {
    tile<ROWS, TILE_GROUPS>(a, lda, b, k, c, ldc, add);
    b.data += TILE_GROUPS * b.group;
    c += TILE_GROUPS * GROUP;
  }
  for (; groups > 0; --groups) {
    tile<ROWS, 1>(a, lda, b, k, c, ldc, add);
    b.data += b.group;
    c += GROUP;
  }
}

// C [m, 16 * groups] (+)= A [m, k] B; for bf16 k is even.
template <class T>
static void gemm(const T* a, int64_t lda, Packed<T> b, int m, int groups, int k, float* c, int64_t ldc, bool add) {
  for (; m >= TILE_ROWS; m -= TILE_ROWS, a += TILE_ROWS * lda, c += TILE_ROWS * ldc)
    columns<TILE_ROWS>(a, lda, b, groups, k, c, ldc, add);
  switch (m) {
    case 5: return columns<5>(a, lda, b, groups, k, c, ldc, add);
    case 4: return columns<4>(a, lda, b, groups, k, c, ldc, add);
    case 3: return columns<3>(a, lda, b, groups, k, c, ldc, add);
    case 2: return columns<2>(a, lda, b, groups, k, c, ldc, add);
    case 1: return columns<1>(a, lda, b, groups, k, c, ldc, add);
  }
}

// Pack `k` rows of `16 * groups` adjacent columns with the row stride `stride`. Returns how to read them.
template <class T>
static Packed<float> pack(const T* from, int64_t stride, int k, int groups, float* to) {
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < k; ++i)
      for (int v = 0; v < VECTORS; ++v)
        store(to + (g * (int64_t)k + i) * GROUP + v * WIDTH, load(from + i * stride + g * GROUP + v * WIDTH));
  return {to, (int64_t)k * GROUP, GROUP};
}

static Packed<float> pack(const float* from, int64_t stride, int, int, float*) { return {from, GROUP, stride}; }

#if HAS_BF16_DOT
static Packed<bf16> pack(const bf16* from, int64_t stride, int k, int groups, bf16* to) {
  const int pairs = (k + 1) / 2;
  for (int i = 0; i < pairs; ++i) {
    const bf16* row = from + 2 * i * stride;
    for (int g = 0; g < groups; ++g, row += GROUP) {
      __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)row));
      __m512i odd = _mm512_setzero_si512();
      if (2 * i + 1 < k) odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row + stride)));
      _mm512_storeu_si512(to + (g * (int64_t)pairs + i) * 2 * GROUP, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
  return {to, (int64_t)pairs * 2 * GROUP, 2 * GROUP};
}
#endif

// Pack elements in any order: element (i, j) is from[offsets[i * row + j * column]].
template <class T>
static Packed<float> pack_table(const T* from, const int32_t* offsets, int64_t row, int64_t column, int k, int groups,
                                float* to) {
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < GROUP; ++j)
        to[(g * (int64_t)k + i) * GROUP + j] = to_float(from[offsets[i * row + (g * GROUP + j) * column]]);
  return {to, (int64_t)k * GROUP, GROUP};
}

#if HAS_BF16_DOT
static Packed<bf16> pack_table(const bf16* from, const int32_t* offsets, int64_t row, int64_t column, int k, int groups,
                               bf16* to) {
  const int pairs = (k + 1) / 2;
  for (int g = 0; g < groups; ++g)
    for (int i = 0; i < 2 * pairs; ++i)
      for (int j = 0; j < GROUP; ++j)
        to[((g * (int64_t)pairs + i / 2) * GROUP + j) * 2 + i % 2] =
            i < k ? from[offsets[i * row + (g * GROUP + j) * column]] : bf16{0};
  return {to, (int64_t)pairs * 2 * GROUP, 2 * GROUP};
}
#endif
