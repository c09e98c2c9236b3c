// Instructions that only compute. Each is a function of one lane's values; Applied<function> makes a handler of it that
// runs over the 32 lanes in loops the compiler vectorises, and knows the widths of the operands from the function's own
// types. A bool result is a predicate.
#include <algorithm>
#include <immintrin.h>
#include <sstream>
#include <unordered_map>
#include "numbers.h"
#include "registers.h"
#include "table.h"

namespace machine {
namespace {

// --- from functions to handlers --------------------------------------------------------------------------------------

inline u32 sign_bits(const u32* words) {
  u32 bits = 0;
  for (int q = 0; q < 4; q++) bits |= (u32)_mm256_movemask_ps(_mm256_load_ps((const float*)words + 8 * q)) << (8 * q);
  return bits;
}
inline u32 sign_bits(const u64* words) {
  u32 bits = 0;
  for (int q = 0; q < 8; q++) bits |= (u32)_mm256_movemask_pd(_mm256_load_pd((const double*)words + 4 * q)) << (4 * q);
  return bits;
}

template <class T> constexpr int width_of = sizeof(T);
template <> constexpr int width_of<bool> = 0;
template <class... A> constexpr int widest = std::max({width_of<A>...});

template <auto function> struct Applied;
template <class R, class... A, R (*function)(A...)> struct Applied<function> {
  template <size_t... I> static void over_all(Warp& warp, const Instruction& in, u32 lanes, std::index_sequence<I...>) {
    over_all(warp, in, lanes, source<A>(warp, in.operands[1 + I])...);
  }
  static void over_all(Warp& warp, const Instruction& in, u32 lanes, const A*... from) {
    if constexpr (std::is_same_v<R, bool>) {
      using Word = std::conditional_t<widest<A...> == 8, u64, u32>;
      alignas(32) Word words[LANES];
      for (int i = 0; i < LANES; i++) words[i] = function(from[i]...) ? ~(Word)0 : 0;
      write_predicate(warp, in.operands[0], sign_bits(words), lanes);
    } else {
      R results[LANES];
      for (int i = 0; i < LANES; i++) results[i] = function(from[i]...);
      write(destination<R>(warp, in.operands[0]), results, lanes);
    }
  }
  template <size_t... I>
  static void over_active(Warp& warp, const Instruction& in, u32 lanes, std::index_sequence<I...>) {
    R* to = destination<R>(warp, in.operands[0]);
    for (int i : each(lanes)) to[i] = function(source<A>(warp, in.operands[1 + I])[i]...);
  }
  static void all(Warp& warp, const Instruction& in, u32 lanes) {
    over_all(warp, in, lanes, std::index_sequence_for<A...>());
  }
  static void active(Warp& warp, const Instruction& in, u32 lanes) {
    over_active(warp, in, lanes, std::index_sequence_for<A...>());
  }
  static constexpr Plain plain(Handler handler, Class counted) {
    return {handler, counted, 1 + (int)sizeof...(A), {width_of<R>, width_of<A>...}};
  }
};

// On all lanes of predicates at once.
template <u32 (*function)(u32, u32)> void of_predicates(Warp& warp, const Instruction& in, u32 lanes) {
  u32 a = *source<u32>(warp, in.operands[1]);
  u32 b = in.operands[2] == ABSENT ? 0 : *source<u32>(warp, in.operands[2]);
  write_predicate(warp, in.operands[0], function(a, b), lanes);
}

struct Table {
  std::unordered_map<std::string, Plain> entries;
  std::string bits;  // stands for # in names

  void add(const std::string& names, const Plain& plain) {
    std::istringstream words(names);
    for (std::string word; words >> word;) {
      if (size_t place = word.find('#'); place != std::string::npos) word.replace(place, 1, bits);
      entries[word] = plain;
    }
  }
  template <auto function> void all(Class counted, const char* names) {
    add(names, Applied<function>::plain(Applied<function>::all, counted));
  }
  // Slow functions: only for lanes that want them.
  template <auto function> void active(Class counted, const char* names) {
    add(names, Applied<function>::plain(Applied<function>::active, counted));
  }
  template <u32 (*function)(u32, u32)> void predicates(const char* names, int operands) {
    add(names, {of_predicates<function>, Class::predicate, operands, {0, 0, 0}});
  }
};

// --- integers --------------------------------------------------------------------------------------------------------

template <class T> T add(T a, T b) { return a + b; }
template <class T> T subtract(T a, T b) { return a - b; }
template <class T> T multiply_low(T a, T b) { return (T)((u64)a * (u64)b); }
template <class T> T multiply_add_low(T a, T b, T c) { return (T)((u64)a * (u64)b + c); }
template <class T> T bit_and(T a, T b) { return a & b; }
template <class T> T bit_or(T a, T b) { return a | b; }
template <class T> T bit_xor(T a, T b) { return a ^ b; }
template <class T> T bit_not(T a) { return ~a; }
template <class T> T is_zero(T a) { return a == 0; }
template <class T> T negate(T a) { return (T)0 - a; }
template <class U, class S> U absolute(S a) { return a < 0 ? (U)0 - (U)a : (U)a; }
template <class T> T smaller(T a, T b) { return a < b ? a : b; }
template <class T> T larger(T a, T b) { return a > b ? a : b; }
s32 smaller_or_zero(s32 a, s32 b) { return std::max(std::min(a, b), 0); }
s32 larger_or_zero(s32 a, s32 b) { return std::max({a, b, 0}); }
template <class T> constexpr u32 bits_in = 8 * sizeof(T);
template <class T> T shift_left(T a, u32 by) { return by >= bits_in<T> ? (T)0 : (T)(a << (by & (bits_in<T> - 1))); }
template <class T> T shift_right(T a, u32 by) { return by >= bits_in<T> ? (T)0 : (T)(a >> (by & (bits_in<T> - 1))); }
template <class T> T shift_signed(T a, u32 by) { return a >> (by >= bits_in<T> ? bits_in<T> - 1 : by); }
template <class T> T divide(T a, T b) {  // by zero: all ones, as GPUs do
  if (b == 0) return (T)-1;
  if (std::is_signed_v<T> && b == (T)-1) return (T)(0 - (u64)a);
  return a / b;
}
template <class T> T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == (T)-1) return 0;
  return a % b;
}
template <class T, class Wide> T multiply_high(T a, T b) { return (T)((Wide)a * b >> bits_in<T>); }
template <class T, class Wide> Wide multiply_wide(T a, T b) { return (Wide)a * b; }
template <class T, class Wide> Wide multiply_add_wide(T a, T b, Wide c) {
  return (Wide)((std::make_unsigned_t<Wide>)((Wide)a * b) + c);
}
template <class T, class Wide> u32 multiply_add_high(T a, T b, u32 c) { return (u32)((Wide)a * b >> 32) + c; }
template <class T> u32 absolute_difference(T a, T b, u32 c) {
  return (u32)(a > b ? (u32)a - (u32)b : (u32)b - (u32)a) + c;
}

u32 leading_zeros(u32 a) { return a ? __builtin_clz(a) : 32; }
u32 leading_zeros_64(u64 a) { return a ? __builtin_clzll(a) : 64; }
u32 ones(u32 a) { return __builtin_popcount(a); }
u32 ones_64(u64 a) { return __builtin_popcountll(a); }
u32 leading_bit(u32 a) { return a ? 31 - __builtin_clz(a) : ~0u; }
u32 leading_bit_signed(s32 a) { return leading_bit(a < 0 ? ~a : a); }
u32 leading_bit_64(u64 a) { return a ? 63 - __builtin_clzll(a) : ~0u; }
u32 leading_bit_signed_64(s64 a) { return leading_bit_64(a < 0 ? ~a : a); }
u32 shift_to_leading_bit(u32 a) { return a ? __builtin_clz(a) : ~0u; }
u32 reverse(u32 a) {
  a = (a >> 1 & 0x55555555) | (a & 0x55555555) << 1;
  a = (a >> 2 & 0x33333333) | (a & 0x33333333) << 2;
  a = (a >> 4 & 0x0f0f0f0f) | (a & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(a);
}
u64 reverse_64(u64 a) { return (u64)reverse((u32)a) << 32 | reverse((u32)(a >> 32)); }

template <class T> T extract(T a, u32 position, u32 length) {  // bfe
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  if (!length) return 0;
  u32 last = std::min(position + length - 1, bits_in<T> - 1);
  U sign = std::is_signed_v<T> && ((U)a >> last & 1) ? ~(U)0 : 0;
  if (position >= bits_in<T>) return (T)sign;
  u32 kept = last - position + 1;
  U mask = kept >= bits_in<T> ? ~(U)0 : ((U)1 << kept) - 1;
  return (T)(((U)a >> position & mask) | (sign & ~mask));
}
template <class T> T insert(T a, T into, u32 position, u32 length) {  // bfi
  position &= 255, length &= 255;
  T mask = length >= bits_in<T> ? ~(T)0 : ((T)1 << length) - 1;
  if (position >= bits_in<T>) return into;
  mask <<= position;
  return (into & ~mask) | (a << position & mask);
}
u32 permute_bytes(u32 a, u32 b, u32 selectors) {  // prmt
  u64 both = a | (u64)b << 32;
  u32 result = 0;
  for (int k = 0; k < 4; k++) {
    u32 selector = selectors >> (4 * k) & 15;
    u32 byte = both >> (8 * (selector & 7)) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;  // its sign instead
    result |= byte << (8 * k);
  }
  return result;
}
u32 logic(u32 a, u32 b, u32 c, u32 table) {  // lop3: bit 4a + 2b + c of the table
  u32 result = 0;
  if (table & 1) result |= ~a & ~b & ~c;
  if (table & 2) result |= ~a & ~b & c;
  if (table & 4) result |= ~a & b & ~c;
  if (table & 8) result |= ~a & b & c;
  if (table & 16) result |= a & ~b & ~c;
  if (table & 32) result |= a & ~b & c;
  if (table & 64) result |= a & b & ~c;
  if (table & 128) result |= a & b & c;
  return result;
}
u64 joined(u32 low, u32 high) { return (u64)high << 32 | low; }
u32 funnel_left_wrap(u32 a, u32 b, u32 by) { return (u32)(joined(a, b) << (by & 31) >> 32); }
u32 funnel_right_wrap(u32 a, u32 b, u32 by) { return (u32)(joined(a, b) >> (by & 31)); }
u32 funnel_left_clamp(u32 a, u32 b, u32 by) { return by >= 32 ? a : (u32)(joined(a, b) << (by & 31) >> 32); }
u32 funnel_right_clamp(u32 a, u32 b, u32 by) { return by >= 32 ? b : (u32)(joined(a, b) >> (by & 31)); }

// --- floats ----------------------------------------------------------------------------------------------------------

template <class T> T multiply(T a, T b) { return a * b; }
template <class T> T quotient(T a, T b) { return a / b; }
template <class T> T reciprocal(T a) { return (T)1 / a; }
float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
double fused_64(double a, double b, double c) { return __builtin_fma(a, b, c); }
float root(float a) { return __builtin_sqrtf(a); }
double root_64(double a) { return __builtin_sqrt(a); }
float reciprocal_root(float a) { return (float)(1.0 / __builtin_sqrt((double)a)); }
double maximum_64(double a, double b) { return std::fmax(a, b); }
double minimum_64(double a, double b) { return std::fmin(a, b); }
float negative(float a) { return bits_as<float>(bits_as<u32>(a) ^ 0x80000000u); }
float magnitude(float a) { return bits_as<float>(bits_as<u32>(a) & 0x7fffffffu); }
template <class T, T mask> T flip(T a) { return a ^ mask; }   // on the bits: signs of NaNs too
template <class T, T mask> T keep(T a) { return a & mask; }
u32 copy_sign(u32 sign, u32 value) { return (sign & 0x80000000u) | (value & 0x7fffffffu); }
float log_2(float a) { return log2f(a); }
float sine(float a) { return sinf(a); }
float cosine(float a) { return cosf(a); }
float tangent_h(float a) { return tanhf(a); }

// 2^x, about 1e-9 relative before the last rounding.
float power_of_2(float x) {
  constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double clamped = x;
  clamped = clamped < -160.0 ? -160.0 : clamped;
  clamped = clamped > 160.0 ? 160.0 : clamped;
  double whole = (clamped + shifter) - shifter, part = clamped - whole;
  double p = 1.54035303933816e-4 * part + 1.33335581464284e-3;
  p = p * part + 9.61812910762848e-3;
  p = p * part + 5.55041086648216e-2;
  p = p * part + 2.40226506959101e-1;
  p = p * part + 6.93147180559945e-1;
  p = p * part + 1.0;
  double square = part * part;
  p += 1.52527338040598e-5 * (square * square) * square * part;
  double scale = bits_as<double>((bits_as<u64>(whole + shifter) + 1023) << 52);
  float result = (float)(p * scale);
  return is_nan(x) ? bits_as<float>(NAN_32) : result;
}

template <float (*f)(float)> float flushed_1(float a) { return flush(f(flush(a))); }
template <float (*f)(float, float)> float flushed_2(float a, float b) { return flush(f(flush(a), flush(b))); }
template <float (*f)(float, float, float)> float flushed_3(float a, float b, float c) {
  return flush(f(flush(a), flush(b), flush(c)));
}

// Floats of 16 bits: in float, then rounded once (a product and its sum in double).
template <class T, float (*f)(float, float)> T in_float(T a, T b) { return narrow<T>(f(widen(a), widen(b))); }
template <class T> T fused_16(T a, T b, T c) { return narrow_once<T>((double)widen(a) * widen(b) + widen(c)); }
template <class T, T (*f)(T, T)> Pair<T> pairwise_2(Pair<T> a, Pair<T> b) {
  return {f(a.low, b.low), f(a.high, b.high)};
}
template <class T, T (*f)(T, T, T)> Pair<T> pairwise_3(Pair<T> a, Pair<T> b, Pair<T> c) {
  return {f(a.low, b.low, c.low), f(a.high, b.high, c.high)};
}

// --- moves, comparisons ----------------------------------------------------------------------------------------------

template <class T> T same(T a) { return a; }

template <class T> void select(Warp& warp, const Instruction& in, u32 lanes) {
  auto *a = source<T>(warp, in.operands[1]), *b = source<T>(warp, in.operands[2]);
  u32 first = *source<u32>(warp, in.operands[3]);
  T results[LANES];
  for (int i = 0; i < LANES; i++) results[i] = b[i] ^ ((a[i] ^ b[i]) & ((T)0 - (T)(first >> i & 1)));
  write(destination<T>(warp, in.operands[0]), results, lanes);
}

template <class T> T value(T x) { return x; }
inline float value(Half x) { return widen(x); }
inline float value(Bfloat x) { return widen(x); }

// In the order of PTX's names: ordered comparisons are false with a NaN, unordered ones true.
template <class T> bool eq(T a, T b) { return value(a) == value(b); }
template <class T> bool ne(T a, T b) { return (value(a) < value(b)) | (value(a) > value(b)); }
template <class T> bool lt(T a, T b) { return value(a) < value(b); }
template <class T> bool le(T a, T b) { return value(a) <= value(b); }
template <class T> bool gt(T a, T b) { return value(a) > value(b); }
template <class T> bool ge(T a, T b) { return value(a) >= value(b); }
template <class T> bool equ(T a, T b) { return !ne(a, b); }
template <class T> bool neu(T a, T b) { return !eq(a, b); }
template <class T> bool ltu(T a, T b) { return !ge(a, b); }
template <class T> bool leu(T a, T b) { return !gt(a, b); }
template <class T> bool gtu(T a, T b) { return !le(a, b); }
template <class T> bool geu(T a, T b) { return !lt(a, b); }
template <class T> bool num(T a, T b) { return (value(a) == value(a)) & (value(b) == value(b)); }
template <class T> bool nan(T a, T b) { return !num(a, b); }
template <bool (*f)(float, float)> bool flushed_comparison(float a, float b) { return f(flush(a), flush(b)); }

template <class T> void compare_pairs(Warp& warp, const Instruction& in, u32 lanes) {
  using Comparison = bool (*)(T, T);
  static constexpr Comparison comparisons[] = {eq<T>,  ne<T>,  lt<T>,  le<T>,  gt<T>,  ge<T>,  equ<T>,
                                               neu<T>, ltu<T>, leu<T>, gtu<T>, geu<T>, num<T>, nan<T>};
  auto *a = source<Pair<T>>(warp, in.operands[2]), *b = source<Pair<T>>(warp, in.operands[3]);
  Comparison compare = comparisons[in.variant];
  u32 low = 0, high = 0;
  for (int i = 0; i < LANES; i++) {
    low |= (u32)compare(a[i].low, b[i].low) << i;
    high |= (u32)compare(a[i].high, b[i].high) << i;
  }
  if (in.operands[0] != ABSENT) write_predicate(warp, in.operands[0], low, lanes);
  if (in.operands[1] != ABSENT) write_predicate(warp, in.operands[1], high, lanes);
}

u32 both(u32 a, u32 b) { return a & b; }
u32 either(u32 a, u32 b) { return a | b; }
u32 one_of(u32 a, u32 b) { return a ^ b; }
u32 inverted(u32 a, u32) { return ~a; }
u32 copied(u32 a, u32) { return a; }

// --- the table -------------------------------------------------------------------------------------------------------

template <class U, class S> void fill_integers(Table& t, const char* bits) {
  constexpr Class c = Class::integer;
  t.bits = bits;
  t.all<add<U>>(c, "add.u# add.s#");
  t.all<subtract<U>>(c, "sub.u# sub.s#");
  t.all<multiply_low<U>>(c, "mul.lo.u# mul.lo.s#");
  t.all<multiply_add_low<U>>(c, "mad.lo.u# mad.lo.s#");
  t.all<bit_and<U>>(c, "and.b#");
  t.all<bit_or<U>>(c, "or.b#");
  t.all<bit_xor<U>>(c, "xor.b#");
  t.all<bit_not<U>>(c, "not.b#");
  t.all<is_zero<U>>(c, "cnot.b#");
  t.all<negate<U>>(c, "neg.s#");
  t.all<absolute<U, S>>(c, "abs.s#");
  t.all<smaller<U>>(c, "min.u#");
  t.all<smaller<S>>(c, "min.s#");
  t.all<larger<U>>(c, "max.u#");
  t.all<larger<S>>(c, "max.s#");
  t.all<shift_left<U>>(c, "shl.b#");
  t.all<shift_right<U>>(c, "shr.u# shr.b#");
  t.all<shift_signed<S>>(c, "shr.s#");
  t.active<divide<U>>(c, "div.u#");
  t.active<divide<S>>(c, "div.s#");
  t.active<remainder<U>>(c, "rem.u#");
  t.active<remainder<S>>(c, "rem.s#");
  t.all<same<U>>(Class::move, "mov.b# mov.u# mov.s# mov.f#");
  t.add("selp.b# selp.u# selp.s# selp.f#", {select<U>, Class::move, 4, {sizeof(U), sizeof(U), sizeof(U), 0}});
}

void fill_products(Table& t) {
  constexpr Class c = Class::integer;
  using s128 = __int128; using u128 = unsigned __int128;
  t.all<multiply_high<u16, u32>>(c, "mul.hi.u16");
  t.all<multiply_high<s16, s32>>(c, "mul.hi.s16");
  t.all<multiply_high<u32, u64>>(c, "mul.hi.u32");
  t.all<multiply_high<s32, s64>>(c, "mul.hi.s32");
  t.all<multiply_high<u64, u128>>(c, "mul.hi.u64");
  t.all<multiply_high<s64, s128>>(c, "mul.hi.s64");
  t.all<multiply_wide<u16, u32>>(c, "mul.wide.u16");
  t.all<multiply_wide<s16, s32>>(c, "mul.wide.s16");
  t.all<multiply_wide<u32, u64>>(c, "mul.wide.u32");
  t.all<multiply_wide<s32, s64>>(c, "mul.wide.s32");
  t.all<multiply_add_wide<u16, u32>>(c, "mad.wide.u16");
  t.all<multiply_add_wide<s16, s32>>(c, "mad.wide.s16");
  t.all<multiply_add_wide<u32, u64>>(c, "mad.wide.u32");
  t.all<multiply_add_wide<s32, s64>>(c, "mad.wide.s32");
  t.all<multiply_add_high<u32, u64>>(c, "mad.hi.u32");
  t.all<multiply_add_high<s32, s64>>(c, "mad.hi.s32");
  t.all<absolute_difference<u32>>(c, "sad.u32");
  t.all<absolute_difference<s32>>(c, "sad.s32");
}

void fill_bits(Table& t) {
  constexpr Class c = Class::integer;
  t.all<smaller_or_zero>(c, "min.relu.s32");
  t.all<larger_or_zero>(c, "max.relu.s32");
  t.all<ones>(c, "popc.b32");
  t.all<ones_64>(c, "popc.b64");
  t.all<leading_zeros>(c, "clz.b32");
  t.all<leading_zeros_64>(c, "clz.b64");
  t.all<leading_bit>(c, "bfind.u32");
  t.all<leading_bit_signed>(c, "bfind.s32");
  t.all<leading_bit_64>(c, "bfind.u64");
  t.all<leading_bit_signed_64>(c, "bfind.s64");
  t.all<shift_to_leading_bit>(c, "bfind.shiftamt.u32");
  t.all<reverse>(c, "brev.b32");
  t.all<reverse_64>(c, "brev.b64");
  t.all<extract<u32>>(c, "bfe.u32");
  t.all<extract<s32>>(c, "bfe.s32");
  t.all<extract<u64>>(c, "bfe.u64");
  t.all<extract<s64>>(c, "bfe.s64");
  t.all<insert<u32>>(c, "bfi.b32");
  t.all<insert<u64>>(c, "bfi.b64");
  t.all<permute_bytes>(c, "prmt.b32");
  t.all<logic>(c, "lop3.b32");
  t.all<funnel_left_wrap>(c, "shf.l.wrap.b32");
  t.all<funnel_right_wrap>(c, "shf.r.wrap.b32");
  t.all<funnel_left_clamp>(c, "shf.l.clamp.b32");
  t.all<funnel_right_clamp>(c, "shf.r.clamp.b32");
}

void fill_floats(Table& t) {
  constexpr Class c = Class::fp, s = Class::special;
  t.all<add<float>>(c, "add.f32 add.rn.f32");
  t.all<subtract<float>>(c, "sub.f32 sub.rn.f32");
  t.all<multiply<float>>(c, "mul.f32 mul.rn.f32");
  t.all<fused>(c, "fma.rn.f32 mad.rn.f32");
  t.all<flushed_2<add<float>>>(c, "add.ftz.f32 add.rn.ftz.f32");
  t.all<flushed_2<subtract<float>>>(c, "sub.ftz.f32 sub.rn.ftz.f32");
  t.all<flushed_2<multiply<float>>>(c, "mul.ftz.f32 mul.rn.ftz.f32");
  t.all<flushed_3<fused>>(c, "fma.rn.ftz.f32 mad.rn.ftz.f32");
  t.all<negative>(c, "neg.f32");
  t.all<magnitude>(c, "abs.f32");
  t.all<flushed_1<negative>>(c, "neg.ftz.f32");
  t.all<flushed_1<magnitude>>(c, "abs.ftz.f32");
  t.all<maximum>(c, "max.f32");
  t.all<minimum>(c, "min.f32");
  t.all<maximum_nan>(c, "max.NaN.f32");
  t.all<minimum_nan>(c, "min.NaN.f32");
  t.all<flushed_2<maximum>>(c, "max.ftz.f32");
  t.all<flushed_2<minimum>>(c, "min.ftz.f32");
  t.all<flushed_2<maximum_nan>>(c, "max.ftz.NaN.f32");
  t.all<flushed_2<minimum_nan>>(c, "min.ftz.NaN.f32");
  t.all<copy_sign>(c, "copysign.f32");
  t.all<quotient<float>>(s, "div.rn.f32 div.full.f32 div.approx.f32");
  t.all<flushed_2<quotient<float>>>(s, "div.rn.ftz.f32 div.full.ftz.f32 div.approx.ftz.f32");
  t.all<reciprocal<float>>(s, "rcp.rn.f32 rcp.approx.f32");
  t.all<flushed_1<reciprocal<float>>>(s, "rcp.rn.ftz.f32 rcp.approx.ftz.f32");
  t.all<root>(s, "sqrt.rn.f32 sqrt.approx.f32");
  t.all<flushed_1<root>>(s, "sqrt.rn.ftz.f32 sqrt.approx.ftz.f32");
  t.all<reciprocal_root>(s, "rsqrt.approx.f32");
  t.all<flushed_1<reciprocal_root>>(s, "rsqrt.approx.ftz.f32");
  t.all<power_of_2>(s, "ex2.approx.f32");
  t.all<flushed_1<power_of_2>>(s, "ex2.approx.ftz.f32");
  t.active<log_2>(s, "lg2.approx.f32");
  t.active<flushed_1<log_2>>(s, "lg2.approx.ftz.f32");
  t.active<sine>(s, "sin.approx.f32");
  t.active<flushed_1<sine>>(s, "sin.approx.ftz.f32");
  t.active<cosine>(s, "cos.approx.f32");
  t.active<flushed_1<cosine>>(s, "cos.approx.ftz.f32");
  t.active<tangent_h>(s, "tanh.approx.f32");
}

void fill_doubles(Table& t) {
  constexpr Class c = Class::fp, s = Class::special;
  constexpr u64 sign = 1ull << 63;
  t.all<add<double>>(c, "add.f64 add.rn.f64");
  t.all<subtract<double>>(c, "sub.f64 sub.rn.f64");
  t.all<multiply<double>>(c, "mul.f64 mul.rn.f64");
  t.all<fused_64>(c, "fma.rn.f64");
  t.all<flip<u64, sign>>(c, "neg.f64");
  t.all<keep<u64, ~sign>>(c, "abs.f64");
  t.all<maximum_64>(c, "max.f64");
  t.all<minimum_64>(c, "min.f64");
  t.all<quotient<double>>(s, "div.rn.f64");
  t.all<reciprocal<double>>(s, "rcp.rn.f64");
  t.all<root_64>(s, "sqrt.rn.f64");
}

template <class T> void fill_floats_16(Table& t, const char* name) {
  constexpr Class c = Class::fp;
  t.bits = name;
  t.all<in_float<T, add<float>>>(c, "add.# add.rn.#");
  t.all<in_float<T, subtract<float>>>(c, "sub.# sub.rn.#");
  t.all<in_float<T, multiply<float>>>(c, "mul.# mul.rn.#");
  t.all<fused_16<T>>(c, "fma.rn.#");
  t.all<in_float<T, maximum>>(c, "max.#");
  t.all<in_float<T, minimum>>(c, "min.#");
  t.all<in_float<T, maximum_nan>>(c, "max.NaN.#");
  t.all<in_float<T, minimum_nan>>(c, "min.NaN.#");
  t.all<flip<u16, 0x8000>>(c, "neg.#");
  t.all<keep<u16, 0x7fff>>(c, "abs.#");
  t.all<pairwise_2<T, in_float<T, add<float>>>>(c, "add.#x2 add.rn.#x2");
  t.all<pairwise_2<T, in_float<T, subtract<float>>>>(c, "sub.#x2 sub.rn.#x2");
  t.all<pairwise_2<T, in_float<T, multiply<float>>>>(c, "mul.#x2 mul.rn.#x2");
  t.all<pairwise_3<T, fused_16<T>>>(c, "fma.rn.#x2");
  t.all<pairwise_2<T, in_float<T, maximum>>>(c, "max.#x2");
  t.all<pairwise_2<T, in_float<T, minimum>>>(c, "min.#x2");
  t.all<pairwise_2<T, in_float<T, maximum_nan>>>(c, "max.NaN.#x2");
  t.all<pairwise_2<T, in_float<T, minimum_nan>>>(c, "min.NaN.#x2");
  t.all<flip<u32, 0x80008000u>>(c, "neg.#x2");
  t.all<keep<u32, 0x7fff7fffu>>(c, "abs.#x2");
}

template <class T> void fill_comparisons(Table& t, const char* type) {
  constexpr Class c = Class::predicate;
  t.bits = type;
  t.all<eq<T>>(c, "setp.eq.#");
  t.all<ne<T>>(c, "setp.ne.#");
  t.all<lt<T>>(c, "setp.lt.#");
  t.all<le<T>>(c, "setp.le.#");
  t.all<gt<T>>(c, "setp.gt.#");
  t.all<ge<T>>(c, "setp.ge.#");
}
template <class T> void fill_unsigned_comparisons(Table& t, const char* type) {
  constexpr Class c = Class::predicate;
  fill_comparisons<T>(t, type);
  t.all<lt<T>>(c, "setp.lo.#");
  t.all<le<T>>(c, "setp.ls.#");
  t.all<gt<T>>(c, "setp.hi.#");
  t.all<ge<T>>(c, "setp.hs.#");
}
template <class T> void fill_float_comparisons(Table& t, const char* type) {
  constexpr Class c = Class::predicate;
  fill_comparisons<T>(t, type);
  t.all<equ<T>>(c, "setp.equ.#");
  t.all<neu<T>>(c, "setp.neu.#");
  t.all<ltu<T>>(c, "setp.ltu.#");
  t.all<leu<T>>(c, "setp.leu.#");
  t.all<gtu<T>>(c, "setp.gtu.#");
  t.all<geu<T>>(c, "setp.geu.#");
  t.all<num<T>>(c, "setp.num.#");
  t.all<nan<T>>(c, "setp.nan.#");
}
void fill_flushed_comparisons(Table& t) {
  constexpr Class c = Class::predicate;
  t.all<flushed_comparison<eq<float>>>(c, "setp.eq.ftz.f32");
  t.all<flushed_comparison<ne<float>>>(c, "setp.ne.ftz.f32");
  t.all<flushed_comparison<lt<float>>>(c, "setp.lt.ftz.f32");
  t.all<flushed_comparison<le<float>>>(c, "setp.le.ftz.f32");
  t.all<flushed_comparison<gt<float>>>(c, "setp.gt.ftz.f32");
  t.all<flushed_comparison<ge<float>>>(c, "setp.ge.ftz.f32");
  t.all<flushed_comparison<equ<float>>>(c, "setp.equ.ftz.f32");
  t.all<flushed_comparison<neu<float>>>(c, "setp.neu.ftz.f32");
  t.all<flushed_comparison<ltu<float>>>(c, "setp.ltu.ftz.f32");
  t.all<flushed_comparison<leu<float>>>(c, "setp.leu.ftz.f32");
  t.all<flushed_comparison<gtu<float>>>(c, "setp.gtu.ftz.f32");
  t.all<flushed_comparison<geu<float>>>(c, "setp.geu.ftz.f32");
}

Table filled() {
  Table t;
  fill_integers<u16, s16>(t, "16");
  fill_integers<u32, s32>(t, "32");
  fill_integers<u64, s64>(t, "64");
  t.all<same<u64>>(Class::move, "cvta.global.u64 cvta.to.global.u64");
  fill_products(t);
  fill_bits(t);
  fill_floats(t);
  fill_doubles(t);
  fill_floats_16<Half>(t, "f16");
  fill_floats_16<Bfloat>(t, "bf16");
  fill_comparisons<s16>(t, "s16");
  fill_comparisons<s32>(t, "s32");
  fill_comparisons<s64>(t, "s64");
  fill_comparisons<u16>(t, "b16");
  fill_comparisons<u32>(t, "b32");
  fill_comparisons<u64>(t, "b64");
  fill_unsigned_comparisons<u16>(t, "u16");
  fill_unsigned_comparisons<u32>(t, "u32");
  fill_unsigned_comparisons<u64>(t, "u64");
  fill_float_comparisons<float>(t, "f32");
  fill_float_comparisons<double>(t, "f64");
  fill_float_comparisons<Half>(t, "f16");
  fill_float_comparisons<Bfloat>(t, "bf16");
  fill_flushed_comparisons(t);
  t.predicates<both>("and.pred", 3);
  t.predicates<either>("or.pred", 3);
  t.predicates<one_of>("xor.pred", 3);
  t.predicates<inverted>("not.pred", 2);
  t.predicates<copied>("mov.pred", 2);
  return t;
}

}  // namespace

const Plain* find_plain(const std::string& opcode) {
  static const Table table = filled();
  auto found = table.entries.find(opcode);
  return found == table.entries.end() ? nullptr : &found->second;
}

Handler find_pair_comparison(Type type) {
  return type == Type::bf16x2 ? compare_pairs<Bfloat> : type == Type::f16x2 ? compare_pairs<Half> : nullptr;
}

// --- around the table ------------------------------------------------------------------------------------------------

void nothing(Warp&, const Instruction&, u32) {}

// setp.cmp.bool: the comparison, then combined with a predicate. variant: 0 and, 1 or, 2 xor.
void combined_comparison(Warp& warp, const Instruction& in, u32 lanes) {
  u32 other = *source<u32>(warp, in.operands[3]), before = *source<u32>(warp, in.operands[0]);
  in.inner(warp, in, ALL_LANES);
  u32 compared = *source<u32>(warp, in.operands[0]);
  if (in.has(NEGATED)) other = ~other;
  u32 result = in.variant == 0 ? compared & other : in.variant == 1 ? compared | other : compared ^ other;
  *destination<u32>(warp, in.operands[0]) = (before & ~lanes) | (result & lanes);
}

// mov.bN d, {a, b, ..}: parts of element_bytes in registers of register_bytes; d is source_bytes wide.
void pack(Warp& warp, const Instruction& in, u32 lanes) {
  for (int i : each(lanes)) {
    u64 whole = 0;
    for (int part = 0; part < in.elements; part++) {
      whole |= value_of(warp, in.operands[1 + part], i, in.register_bytes, in.element_bytes)
               << (8 * in.element_bytes * part);
    }
    memcpy(lane_of(warp, in.operands[0], i, in.source_bytes), &whole, in.source_bytes);
  }
}

// mov.bN {a, b, ..}, s
void unpack(Warp& warp, const Instruction& in, u32 lanes) {
  for (int i : each(lanes)) {
    u64 whole = value_of(warp, in.operands[0], i, in.source_bytes, in.source_bytes);
    for (int part = 0; part < in.elements; part++) {
      if (in.operands[1 + part] == ABSENT) continue;
      u64 value = whole >> (8 * in.element_bytes * part);
      if (in.element_bytes < 8) value &= (1ull << (8 * in.element_bytes)) - 1;
      memcpy(lane_of(warp, in.operands[1 + part], i, in.register_bytes), &value, in.register_bytes);
    }
  }
}

// The same where parts fill their registers, over all lanes.
template <class Whole, class Part> static void pack_all(Warp& warp, const Instruction& in, u32 lanes) {
  Whole results[LANES] = {};
  for (int part = 0; part < in.elements; part++) {
    const Part* from = source<Part>(warp, in.operands[1 + part]);
    for (int i = 0; i < LANES; i++) results[i] |= (Whole)((Whole)from[i] << (bits_in<Part> * part));
  }
  write(destination<Whole>(warp, in.operands[0]), results, lanes);
}
template <class Whole, class Part> static void unpack_all(Warp& warp, const Instruction& in, u32 lanes) {
  const Whole* from = source<Whole>(warp, in.operands[0]);
  for (int part = 0; part < in.elements; part++) {
    if (in.operands[1 + part] == ABSENT) continue;
    Part results[LANES];
    for (int i = 0; i < LANES; i++) results[i] = (Part)(from[i] >> (bits_in<Part> * part));
    write(destination<Part>(warp, in.operands[1 + part]), results, lanes);
  }
}
Handler find_vector_move(bool unpacks, int whole, int part, int register_bytes) {
  if (part == register_bytes && whole == 4 && part == 2) return unpacks ? unpack_all<u32, u16> : pack_all<u32, u16>;
  if (part == register_bytes && whole == 8 && part == 4) return unpacks ? unpack_all<u64, u32> : pack_all<u64, u32>;
  if (part == register_bytes && whole == 8 && part == 2) return unpacks ? unpack_all<u64, u16> : pack_all<u64, u16>;
  return unpacks ? unpack : pack;
}

void load_parameter(Warp& warp, const Instruction& in, u32 lanes) {
  auto* from = (const u8*)warp.launch->parameters.data() + in.offset;
  for (int part = 0; part < in.elements; part++) {
    for (int i : each(lanes)) load_element(warp, in, in.operands[part], i, from + part * in.element_bytes);
  }
}

void read_clock(Warp& warp, const Instruction& in, u32 lanes) {
  u64 now = warp.launch->moment;
  for (int i : each(lanes)) memcpy(lane_of(warp, in.operands[0], i, in.register_bytes), &now, in.register_bytes);
}

}  // namespace machine
