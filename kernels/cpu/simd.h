// Vectors of floats as wide as the CPU's, through the compiler's vector types: right on every CPU, fast on AVX2,
// AVX-512 and NEON. The library is compiled on the machine that runs it, so the widths are known here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16;       // floats of a vector
constexpr int TILE_GROUPS = 4;  // column groups of a register tile, see gemm.h
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int TILE_GROUPS = 1;
#else
constexpr int WIDTH = 4;
constexpr int TILE_GROUPS = 1;
#endif
constexpr int GROUP = 16;  // adjacent columns in a packed operand
constexpr int VECTORS = GROUP / WIDTH;

typedef float vfloat __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vint __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vuint __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t vshort __attribute__((vector_size(WIDTH * 2)));

struct bf16 {
  uint16_t bits;
};
#if defined(__FLT16_MAX__)
#define HAS_FP16 1
typedef _Float16 fp16;
typedef fp16 vhalf __attribute__((vector_size(WIDTH * 2)));
#else
#define HAS_FP16 0
#endif

template <class V, class T>
static inline V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

static inline vfloat splat(float x) { return vfloat{} + x; }

static inline vfloat load(const float* from) { return load_as<vfloat>(from); }
static inline vfloat load(const bf16* from) {
  return (vfloat)(__builtin_convertvector(load_as<vshort>(from), vuint) << 16);
}
#if HAS_FP16
static inline vfloat load(const fp16* from) { return __builtin_convertvector(load_as<vhalf>(from), vfloat); }
#endif

static inline void store(float* to, vfloat v) { std::memcpy(to, &v, sizeof v); }
static inline void store(bf16* to, vfloat v) {  // rounds to the nearest, ties to even; NaN stays NaN
#if HAS_BF16_DOT
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  vuint bits = (vuint)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = v == v ? bits : vuint{} + 0x7fc0;
  vshort half = __builtin_convertvector(bits, vshort);
#endif
  std::memcpy(to, &half, sizeof half);
}
#if HAS_FP16
static inline void store(fp16* to, vfloat v) {
  vhalf half = __builtin_convertvector(v, vhalf);
  std::memcpy(to, &half, sizeof half);
}
#endif

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
#if HAS_FP16
static inline float to_float(fp16 x) { return (float)x; }
#endif

static inline vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }

static inline float reduce_max(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float best = v[0];
  for (int i = 1; i < WIDTH; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

static inline float reduce_sum(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float sum = v[0];
  for (int i = 1; i < WIDTH; ++i) sum += v[i];
  return sum;
}

// exp of x <= 88, accurate to 2 units in the last place; 0 below -104 (without AVX-512 below -87).
static inline vfloat vexp(vfloat x) {
  const vfloat magic = splat(12582912.0f);  // adding it rounds to an integer
  vfloat clamped = vmax(splat(-105.0f), x);  // in this order of arguments NaN stays NaN
  vfloat n = clamped * 1.44269504f + magic - magic;
  vfloat r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vint power = (__builtin_convertvector(n, vint) + 127) << 23;
  return x < -87.0f ? vfloat{} : p * (vfloat)power;
#endif
}
