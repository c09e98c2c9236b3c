// Registers of a warp, 32 lanes at a time, and number formats.
#pragma once

#include "machine.h"
#include <immintrin.h>
template <class X>
ALWAYS_INLINE X* destination(const Warp& w, s32 o) {
  return (X*)(w.registers + o);
}
template <class X>
ALWAYS_INLINE const X* source(const Warp& w, s32 o) {
  return (const X*)((o < 0 ? w.constants : w.registers) + (o & 0x7fffffff));
}
template <class X>
ALWAYS_INLINE void merge_lanes(X* d, const X* t, u32 m) {
  for (int i = 0; i < 32; i++) d[i] = (m >> i) & 1 ? t[i] : d[i];
}
template <class Y, class X, class F>
ALWAYS_INLINE void unary(Warp& w, const Instruction& in, u32 m, F f) {
  Y* d = destination<Y>(w, in.operand[0]);
  const X* a = source<X>(w, in.operand[1]);
  Y t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i]);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    merge_lanes(d, t, m);
}
template <class Y, class X, class X2, class F>
ALWAYS_INLINE void binary(Warp& w, const Instruction& in, u32 m, F f) {
  Y* d = destination<Y>(w, in.operand[0]);
  const X* a = source<X>(w, in.operand[1]);
  const X2* b = source<X2>(w, in.operand[2]);
  Y t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i]);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    merge_lanes(d, t, m);
}
template <class Y, class X, class X2, class X3, class F>
ALWAYS_INLINE void ternary(Warp& w, const Instruction& in, u32 m, F f) {
  Y* d = destination<Y>(w, in.operand[0]);
  const X* a = source<X>(w, in.operand[1]);
  const X2* b = source<X2>(w, in.operand[2]);
  const X3* c = source<X3>(w, in.operand[3]);
  Y t[32];
  for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i], c[i]);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    merge_lanes(d, t, m);
}
// masked-lane scalar variants for operations that may trap (division) or are slow
template <class Y, class X, class F>
ALWAYS_INLINE void binary_by_lane(Warp& w, const Instruction& in, u32 m, F f) {
  Y* d = destination<Y>(w, in.operand[0]);
  const X* a = source<X>(w, in.operand[1]);
  const X* b = source<X>(w, in.operand[2]);
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) d[i] = f(a[i], b[i]);
}
template <class Y, class X, class F>
ALWAYS_INLINE void unary_by_lane(Warp& w, const Instruction& in, u32 m, F f) {
  Y* d = destination<Y>(w, in.operand[0]);
  const X* a = source<X>(w, in.operand[1]);
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) d[i] = f(a[i]);
}
ALWAYS_INLINE u32 bits_of_float(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  return u;
}
ALWAYS_INLINE float float_of_bits(u32 u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
ALWAYS_INLINE u64 bits_of_double(double f) {
  u64 u;
  memcpy(&u, &f, 8);
  return u;
}
ALWAYS_INLINE float flushed(float x) {
  u32 u = bits_of_float(x);
  return (u & 0x7f800000u) == 0 ? float_of_bits(u & 0x80000000u) : x;
}
ALWAYS_INLINE float float_of_bf16(u16 h) { return float_of_bits((u32)h << 16); }
ALWAYS_INLINE u16 bf16_of_float(float f) {
  u32 b = bits_of_float(f);
  u32 r = (b + (0x7fffu + ((b >> 16) & 1))) >> 16;
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)r;
}
ALWAYS_INLINE u16 bf16_toward_zero(float f) {
  u32 b = bits_of_float(f);
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)(b >> 16);
}
ALWAYS_INLINE float float_of_fp16(u16 h) { return _cvtsh_ss(h); }
ALWAYS_INLINE u16 fp16_of_float(float f) { return (u16)_cvtss_sh(f, 0); }
ALWAYS_INLINE u16 fp16_toward_zero(float f) { return (u16)_cvtss_sh(f, 3); }
ALWAYS_INLINE float rounded_to_odd(
    double d) {  // double to float, round to odd (so that a second rounding is right)
  float f = (float)d;
  if ((double)f == d || d != d || std::isinf(f)) {
    if (!std::isinf(f) || std::isinf(d) || d != d) return f;
  }
  u32 u = bits_of_float(f);
  if (std::isinf(f)) return float_of_bits((u & 0x80000000u) | 0x7f7fffffu);
  if (std::fabs((double)f) > std::fabs(d)) u -= 1;  // toward zero
  return float_of_bits(u | 1);
}
ALWAYS_INLINE u16 fp16_of_double(double d) { return fp16_of_float(rounded_to_odd(d)); }
ALWAYS_INLINE u16 bf16_of_double(double d) { return bf16_of_float(rounded_to_odd(d)); }
ALWAYS_INLINE float max_number(float a, float b) {
  u32 x = bits_of_float(a), y = bits_of_float(b);
  float r = a > b ? a : b;
  r = a == b ? float_of_bits(x & y) : r;
  r = a != a ? b : r;
  r = b != b ? a : r;
  return (a != a) & (b != b) ? float_of_bits(0x7fffffff) : r;
}
ALWAYS_INLINE float min_number(float a, float b) {
  u32 x = bits_of_float(a), y = bits_of_float(b);
  float r = a < b ? a : b;
  r = a == b ? float_of_bits(x | y) : r;
  r = a != a ? b : r;
  r = b != b ? a : r;
  return (a != a) & (b != b) ? float_of_bits(0x7fffffff) : r;
}
ALWAYS_INLINE float max_or_nan(float a, float b) {
  return (a != a) | (b != b) ? float_of_bits(0x7fffffff) : max_number(a, b);
}
ALWAYS_INLINE float min_or_nan(float a, float b) {
  return (a != a) | (b != b) ? float_of_bits(0x7fffffff) : min_number(a, b);
}
ALWAYS_INLINE float ex2f(float x) {  // 2^x to about 1e-9 relative (then rounded)
  double c = x;
  c = c < -160.0 ? -160.0 : c;
  c = c > 160.0 ? 160.0 : c;
  double n = (c + 6755399441055744.0) - 6755399441055744.0, f = c - n;
  double p = 1.54035303933816e-4 * f + 1.33335581464284e-3;
  p = p * f + 9.61812910762848e-3;
  p = p * f + 5.55041086648216e-2;
  p = p * f + 2.40226506959101e-1;
  p = p * f + 6.93147180559945e-1;
  p = p * f + 1.0;
  // the terms above leave 1.5e-8: next term
  double f2 = f * f, f4 = f2 * f2;
  p += 1.52527338040598e-5 * f4 * f2 * f;
  u64 e;
  double m = n + 6755399441055744.0;
  memcpy(&e, &m, 8);
  e = (e + 1023) << 52;
  double s;
  memcpy(&s, &e, 8);
  double r = p * s;
  float o = (float)r;
  return x != x ? float_of_bits(0x7fffffff) : o;
}
