// cvt: between integers and floats of all widths; pairs; floats of 8 bits.
#include <cmath>
#include <string>
#include <unordered_map>
#include "numbers.h"
#include "registers.h"
#include "table.h"

namespace machine {

// --- floats of 8 bits ------------------------------------------------------------------------------------------------

float widen(u8 bits, Tiny format) {
  int mantissa_bits = format.mantissa_bits, bias = (1 << (format.exponent_bits - 1)) - 1;
  int exponent = (bits & 0x7f) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  float sign = bits & 0x80 ? -1.f : 1.f;
  bool last = exponent == (1 << format.exponent_bits) - 1;
  if (format.has_infinity && last) return mantissa ? bits_as<float>(NAN_32) : sign * INFINITY;
  if (!format.has_infinity && (bits & 0x7f) == 0x7f) return bits_as<float>(NAN_32);
  if (exponent == 0) return sign * std::ldexp((float)mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((float)(mantissa | 1 << mantissa_bits), exponent - bias - mantissa_bits);
}

u8 narrow_saturated(float x, Tiny format) {
  u8 sign = std::signbit(x) ? 0x80 : 0;
  if (is_nan(x)) return 0x7f;
  // The codes below NaN and infinity ascend with the values: the nearest of two neighbours, or the even code.
  int largest = format.has_infinity ? 0x7b : 0x7e, low = 0;
  float size = std::fabs(x);
  if (size >= widen(largest, format)) return sign | largest;
  for (int step = 64; step; step /= 2) {
    if (low + step <= largest && widen(low + step, format) <= size) low += step;
  }
  float below = size - widen(low, format), above = widen(low + 1, format) - size;
  bool up = above < below || (above == below && low & 1);
  return sign | (low + up);
}

static Tiny format_of(Type type) { return type == Type::e4m3x2 ? E4M3 : E5M2; }
static float relu(const Instruction& in, float x) { return in.has(RELU) && !(x > 0) && !is_nan(x) ? 0.f : x; }

void convert_tiny_from_floats(Warp& warp, const Instruction& in, u32 lanes) {
  auto *high = source<float>(warp, in.operands[1]), *low = source<float>(warp, in.operands[2]);
  Tiny format = format_of(in.type);
  u16* to = destination<u16>(warp, in.operands[0]);
  for (int i : each(lanes)) {
    to[i] = (u16)(narrow_saturated(relu(in, low[i]), format) | narrow_saturated(relu(in, high[i]), format) << 8);
  }
}

void convert_tiny_from_halves(Warp& warp, const Instruction& in, u32 lanes) {
  auto* from = source<HalfPair>(warp, in.operands[1]);
  Tiny format = format_of(in.type);
  u16* to = destination<u16>(warp, in.operands[0]);
  for (int i : each(lanes)) {
    float low = relu(in, widen(from[i].low)), high = relu(in, widen(from[i].high));
    to[i] = (u16)(narrow_saturated(low, format) | narrow_saturated(high, format) << 8);
  }
}

void convert_tiny_to_halves(Warp& warp, const Instruction& in, u32 lanes) {
  auto* from = source<u16>(warp, in.operands[1]);
  Tiny format = format_of(in.source_type);
  HalfPair results[LANES];
  for (int i : each(lanes)) {
    float low = relu(in, widen((u8)from[i], format)), high = relu(in, widen((u8)(from[i] >> 8), format));
    results[i] = {narrow<Half>(low), narrow<Half>(high)};
  }
  HalfPair* to = destination<HalfPair>(warp, in.operands[0]);
  for (int i : each(lanes)) to[i] = results[i];
}

// --- the general conversion, one lane --------------------------------------------------------------------------------

static double float_from(const Instruction& in, u64 bits) {
  switch (in.source_type) {
    case Type::f16: return widen(Half{(u16)bits});
    case Type::bf16: return widen(Bfloat{(u16)bits});
    case Type::f64: return bits_as<double>(bits);
    default: return in.has(FLUSH_SUBNORMALS) ? flush(bits_as<float>((u32)bits)) : bits_as<float>((u32)bits);
  }
}

static double to_integral(Rounding rounding, double x) {
  switch (rounding) {
    case Rounding::integer_nearest: return __builtin_rint(x);
    case Rounding::integer_zero: return __builtin_trunc(x);
    case Rounding::integer_down: return __builtin_floor(x);
    case Rounding::integer_up: return __builtin_ceil(x);
    default: return x;
  }
}

static u64 float_bits(const Instruction& in, double x) {
  bool to_zero = in.rounding == Rounding::zero;
  if (in.has(SATURATE)) x = !(x > 0) ? 0 : x > 1 ? 1 : x;  // NaN becomes 0
  if (in.has(RELU) && x <= 0) x = 0;
  if (x != x) return in.type == Type::f64 ? 0x7fffffffffffffffull : bytes_of(in.type) == 4 ? NAN_32 : 0x7fff;
  // Truncating a value that was rounded to odd truncates the value itself.
  switch (in.type) {
    case Type::f16: return (to_zero ? narrow_to_zero<Half>(to_odd(x)) : narrow_once<Half>(x)).bits;
    case Type::bf16: return (to_zero ? narrow_to_zero<Bfloat>(to_odd(x)) : narrow_once<Bfloat>(x)).bits;
    case Type::f64: return bits_as<u64>(x);
    case Type::tf32: {  // ties away from zero
      u32 bits = bits_as<u32>((float)x);
      if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000;
      return bits & ~0x1fffu;
    }
    default: {
      float result = (float)x;
      if (to_zero && std::fabs((double)result) > std::fabs(x)) result = bits_as<float>(bits_as<u32>(result) - 1);
      return bits_as<u32>(in.has(FLUSH_SUBNORMALS) ? flush(result) : result);
    }
  }
}

// Integers fill their registers extended by sign or with zeroes.
static u64 fitted(u64 value, int bits, bool with_sign) {
  if (bits == 64) return value;
  u64 mask = (1ull << bits) - 1;
  bool negative = with_sign && (value >> (bits - 1) & 1);
  return negative ? value | ~mask : value & mask;
}

static u64 integer_from_float(const Instruction& in, double x) {
  int bits = 8 * bytes_of(in.type);
  u64 top = 1ull << (bits - 1);
  if (x != x) return fitted(bits == 64 || in.source_type == Type::f64 ? top : 0, bits, is_signed(in.type));
  double limit = std::ldexp(1.0, is_signed(in.type) ? bits - 1 : bits);
  if (is_signed(in.type)) return fitted(x <= -limit ? top : x >= limit ? top - 1 : (u64)(s64)x, bits, true);
  return x <= 0 ? 0 : x >= limit ? fitted(~0ull, bits, false) : (u64)x;
}

static u64 integer_from_integer(const Instruction& in, u64 value) {
  int bits = 8 * bytes_of(in.type);
  bool to_signed = is_signed(in.type);
  if (in.has(SATURATE)) {
    __int128 x = is_signed(in.source_type) ? (__int128)(s64)value : (__int128)value;
    __int128 low = to_signed ? -((__int128)1 << (bits - 1)) : 0;
    __int128 high = ((__int128)1 << (to_signed ? bits - 1 : bits)) - 1;
    value = (u64)(x < low ? low : x > high ? high : x);
  }
  return fitted(value, bits, to_signed);
}

static u64 float_from_integer(const Instruction& in, u64 value) {
  bool with_sign = is_signed(in.source_type);
  double wide = with_sign ? (double)(s64)value : (double)value;
  if (in.type == Type::f64) return bits_as<u64>(wide);
  if (in.type != Type::f32) return float_bits(in, wide);
  float result = with_sign ? (float)(s64)value : (float)value;
  if (in.rounding == Rounding::zero) {
    long double exact = with_sign ? (long double)(s64)value : (long double)value;
    if (fabsl((long double)result) > fabsl(exact)) return bits_as<u32>(result) - 1;
  }
  return bits_as<u32>(result);
}

void convert(Warp& warp, const Instruction& in, u32 lanes) {
  int bits = 8 * bytes_of(in.source_type);
  for (int i : each(lanes)) {
    u64 value =
        fitted(value_of(warp, in.operands[1], i, in.source_bytes, in.source_bytes), bits, is_signed(in.source_type));
    u64 result;
    if (is_float(in.source_type)) {
      double x = to_integral(in.rounding, float_from(in, value));
      result = is_float(in.type) ? float_bits(in, x) : integer_from_float(in, x);
    } else {
      result = is_float(in.type) ? float_from_integer(in, value) : integer_from_integer(in, value);
    }
    memcpy(lane_of(warp, in.operands[0], i, in.register_bytes), &result, in.register_bytes);
  }
}

// --- common conversions, over all lanes ------------------------------------------------------------------------------

// d, high, low
template <class T> static void pair_from_floats(Warp& warp, const Instruction& in, u32 lanes) {
  auto *high = source<float>(warp, in.operands[1]), *low = source<float>(warp, in.operands[2]);
  bool to_zero = in.rounding == Rounding::zero;
  Pair<T> results[LANES];
  for (int i = 0; i < LANES; i++) {
    float x = relu(in, low[i]), y = relu(in, high[i]);
    results[i] = to_zero ? Pair<T>{narrow_to_zero<T>(x), narrow_to_zero<T>(y)} : Pair<T>{narrow<T>(x), narrow<T>(y)};
  }
  write(destination<Pair<T>>(warp, in.operands[0]), results, lanes);
}
void convert_pair(Warp& warp, const Instruction& in, u32 lanes) {
  if (in.type == Type::bf16x2) pair_from_floats<Bfloat>(warp, in, lanes); else pair_from_floats<Half>(warp, in, lanes);
}

template <class To, class From, To (*function)(From)>
static void over_all(Warp& warp, const Instruction& in, u32 lanes) {
  const From* from = source<From>(warp, in.operands[1]);
  To results[LANES];
  for (int i = 0; i < LANES; i++) results[i] = function(from[i]);
  write(destination<To>(warp, in.operands[0]), results, lanes);
}
template <class To, class From> static To cast(From x) { return (To)x; }
template <class To, class From> constexpr Handler casting = over_all<To, From, cast<To, From>>;

Handler find_conversion(const std::string& key) {
  static const std::unordered_map<std::string, Handler> known = {
    {"cvt.s64.s32:84", casting<s64, s32>}, {"cvt.u64.u32:84", casting<u64, u32>},
    {"cvt.u32.u64:48", casting<u32, u64>}, {"cvt.u16.u32:24", casting<u16, u32>},
    {"cvt.u32.u16:42", casting<u32, u16>}, {"cvt.s32.s16:42", casting<s32, s16>},
    {"cvt.rn.f32.s32:44", casting<float, s32>}, {"cvt.rn.f32.u32:44", casting<float, u32>},
    {"cvt.rn.f32.s64:48", casting<float, s64>}, {"cvt.rn.f32.u64:48", casting<float, u64>},
    {"cvt.f32.bf16:42", over_all<float, Bfloat, widen>}, {"cvt.f32.f16:42", over_all<float, Half, widen>},
    {"cvt.rn.bf16.f32:24", over_all<Bfloat, float, narrow<Bfloat>>},
    {"cvt.rn.f16.f32:24", over_all<Half, float, narrow<Half>>},
  };
  auto found = known.find(key);
  return found == known.end() ? nullptr : found->second;
}

}  // namespace machine
