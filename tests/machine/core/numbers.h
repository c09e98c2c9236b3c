// Number formats that C++ does not have, and PTX's rules for minimum, maximum and subnormals.
#pragma once
#include <cmath>
#include <immintrin.h>
#include "instruction.h"

namespace machine {

template <class To, class From> inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same size");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

struct Half { u16 bits; };
struct Bfloat { u16 bits; };
template <class T> struct Pair { T low, high; };
using HalfPair = Pair<Half>;
using BfloatPair = Pair<Bfloat>;

constexpr u32 NAN_32 = 0x7fffffff;

inline bool is_nan(float x) { return x != x; }
inline float flush(float x) {
  u32 bits = bits_as<u32>(x);
  return (bits & 0x7f800000u) == 0 ? bits_as<float>(bits & 0x80000000u) : x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Half x) { return _cvtsh_ss(x.bits); }
inline float widen(Bfloat x) { return bits_as<float>((u32)x.bits << 16); }

// narrow<T>(float): to the nearest, ties to even; NaN becomes the canonical one.
template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline Half narrow<Half>(float x) { return {is_nan(x) ? (u16)0x7fff : (u16)_cvtss_sh(x, 0)}; }
template <> inline Bfloat narrow<Bfloat>(float x) {
  u32 bits = bits_as<u32>(x);
  u32 rounded = (bits + (0x7fffu + (bits >> 16 & 1))) >> 16;
  return {(bits & 0x7fffffffu) > 0x7f800000u ? (u16)0x7fff : (u16)rounded};
}
template <class T> T narrow_to_zero(float x);
template <> inline Half narrow_to_zero<Half>(float x) { return {is_nan(x) ? (u16)0x7fff : (u16)_cvtss_sh(x, 3)}; }
template <> inline Bfloat narrow_to_zero<Bfloat>(float x) {
  return {is_nan(x) ? (u16)0x7fff : (u16)(bits_as<u32>(x) >> 16)};
}

// double to float, rounded to odd, so that a second rounding comes out as if it were the only one.
inline float to_odd(double x) {
  float nearest = (float)x;
  if ((double)nearest == x || x != x || std::isinf(x)) return nearest;
  u32 bits = bits_as<u32>(nearest);
  if (std::isinf(nearest)) return bits_as<float>((bits & 0x80000000u) | 0x7f7fffffu);
  if (std::fabs((double)nearest) > std::fabs(x)) bits -= 1;
  return bits_as<float>(bits | 1);
}
template <class T> inline T narrow_once(double x) { return narrow<T>(to_odd(x)); }

// The other operand where one is NaN; -0 is less than +0.
inline float maximum(float a, float b) {
  float larger = a > b ? a : b;
  larger = a == b ? bits_as<float>(bits_as<u32>(a) & bits_as<u32>(b)) : larger;
  larger = is_nan(a) ? b : larger;
  larger = is_nan(b) ? a : larger;
  return is_nan(a) & is_nan(b) ? bits_as<float>(NAN_32) : larger;
}
inline float minimum(float a, float b) {
  float smaller = a < b ? a : b;
  smaller = a == b ? bits_as<float>(bits_as<u32>(a) | bits_as<u32>(b)) : smaller;
  smaller = is_nan(a) ? b : smaller;
  smaller = is_nan(b) ? a : smaller;
  return is_nan(a) & is_nan(b) ? bits_as<float>(NAN_32) : smaller;
}
// NaN where one is NaN.
inline float maximum_nan(float a, float b) { return is_nan(a) | is_nan(b) ? bits_as<float>(NAN_32) : maximum(a, b); }
inline float minimum_nan(float a, float b) { return is_nan(a) | is_nan(b) ? bits_as<float>(NAN_32) : minimum(a, b); }

// Floats of 8 bits: 4 bits of exponent and 3 of mantissa without infinities (e4m3), or 5 and 2 (e5m2).
struct Tiny { int exponent_bits, mantissa_bits; bool has_infinity; };
constexpr Tiny E4M3{4, 3, false}, E5M2{5, 2, true};
float widen(u8 bits, Tiny format);
u8 narrow_saturated(float x, Tiny format);  // nearest, ties to even; beyond the largest number: that number

}  // namespace machine
