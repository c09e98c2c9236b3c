// Conversions between types.
#pragma once

static ALWAYS_INLINE int bytes_of(u8 t) {
  switch (t) {
    case TYPE_B8:
    case TYPE_U8:
    case TYPE_S8: return 1;
    case TYPE_B16:
    case TYPE_U16:
    case TYPE_S16:
    case TYPE_F16:
    case TYPE_BF16: return 2;
    case TYPE_B64:
    case TYPE_U64:
    case TYPE_S64:
    case TYPE_F64: return 8;
    case TYPE_B128: return 16;
    case TYPE_PRED: return 0;
    default: return 4;
  }
}
static ALWAYS_INLINE bool is_float(u8 t) {
  return t == TYPE_F16 || t == TYPE_BF16 || t == TYPE_F32 || t == TYPE_F64 || t == TYPE_TF32;
}
static ALWAYS_INLINE bool is_signed(u8 t) {
  return t == TYPE_S8 || t == TYPE_S16 || t == TYPE_S32 || t == TYPE_S64;
}
enum { R_NONE, R_RN, R_RZ, R_RM, R_RP, R_RNI, R_RZI, R_RMI, R_RPI, R_RNA };
H(convert) {  // generic; t1 destination type, t2 source type, register_bytes/source_bytes register widths
  LANES {
    u64 x = 0;
    memcpy(&x, source<u8>(w, in.operand[1]) + (size_t)i * in.source_bytes, in.source_bytes);
    int tw = bytes_of(in.source_type) * 8;
    if (tw < 64) x &= (1ull << tw) - 1;
    u64 r = 0;
    if (is_float(in.source_type)) {
      double v;
      switch (in.source_type) {
        case TYPE_F16: v = float_of_fp16((u16)x); break;
        case TYPE_BF16: v = float_of_bf16((u16)x); break;
        case TYPE_F64: memcpy(&v, &x, 8); break;
        default: v = (in.flag & 1) ? flushed(float_of_bits((u32)x)) : float_of_bits((u32)x);
      }
      if (in.rounding == R_RNI)
        v = __builtin_rint(v);
      else if (in.rounding == R_RZI)
        v = __builtin_trunc(v);
      else if (in.rounding == R_RMI)
        v = __builtin_floor(v);
      else if (in.rounding == R_RPI)
        v = __builtin_ceil(v);
      if (is_float(in.type)) {
        if (in.flag & 2) v = v != v ? 0 : v < 0 ? 0 : v > 1 ? 1 : v;
        switch (in.type) {
          case TYPE_F16: r = in.rounding == R_RZ ? fp16_toward_zero((float)v) : fp16_of_double(v); break;
          case TYPE_BF16: r = in.rounding == R_RZ ? bf16_toward_zero((float)v) : bf16_of_double(v); break;
          case TYPE_F64: r = bits_of_double(v); break;
          case TYPE_TF32: {
            u32 u = bits_of_float((float)v);
            if ((u & 0x7f800000u) != 0x7f800000u) u += 0x1000;
            r = u & ~0x1fffu;
            break;
          }
          default: {
            float f = (float)v;
            if (in.rounding == R_RZ && std::fabs((double)f) > std::fabs(v))
              f = float_of_bits(bits_of_float(f) - 1);
            r = bits_of_float((in.flag & 1) ? flushed(f) : f);
          }
        }
        if (v != v) r = in.type == TYPE_F64 ? 0x7fffffffffffffffull : in.type == TYPE_F32 ? 0x7fffffff : 0x7fff;
      } else {
        int W = bytes_of(in.type) * 8;
        bool sg = is_signed(in.type);
        if (v != v)
          r = (W == 64 || in.source_type == TYPE_F64) ? 1ull << (W - 1) : 0;
        else if (sg) {
          double lo = -ldexp(1.0, W - 1), hi = ldexp(1.0, W - 1);
          r = v <= lo ? 1ull << (W - 1) : v >= hi ? (1ull << (W - 1)) - 1 : (u64)(s64)v;
        } else {
          double hi = ldexp(1.0, W);
          r = v <= 0 ? 0 : v >= hi ? (W == 64 ? ~0ull : (1ull << W) - 1) : (u64)v;
        }
        if (W < 64) {
          r &= (1ull << W) - 1;
          if (sg && (r >> (W - 1)) & 1) r |= ~((1ull << W) - 1);
        }
      }
    } else {
      s64 sx = (s64)x;
      if (is_signed(in.source_type) && tw < 64) sx = (s64)(x << (64 - tw)) >> (64 - tw);
      if (is_float(in.type)) {
        bool sg = is_signed(in.source_type);
        switch (in.type) {
          case TYPE_F32: {
            float f = sg ? (float)sx : (float)x;
            r = bits_of_float(f);
            if (in.rounding == R_RZ) {
              long double e = sg ? (long double)sx : (long double)x;
              if (fabsl((long double)f) > fabsl(e)) r -= 1;
            }
            break;
          }
          case TYPE_F64: r = bits_of_double(sg ? (double)sx : (double)x); break;
          case TYPE_F16: r = fp16_of_double(sg ? (double)sx : (double)x); break;
          default: r = bf16_of_double(sg ? (double)sx : (double)x);
        }
      } else {
        int W = bytes_of(in.type) * 8;
        bool sg = is_signed(in.type);
        r = (u64)sx;
        if (in.flag & 2) {  // .sat
          s128 v = is_signed(in.source_type) ? (s128)sx : (s128)x, lo = sg ? -((s128)1 << (W - 1)) : 0,
               hi = sg ? ((s128)1 << (W - 1)) - 1 : ((s128)1 << W) - 1;
          v = v < lo ? lo : v > hi ? hi : v;
          r = (u64)v;
        }
        if (W < 64) {
          r &= (1ull << W) - 1;
          if (sg && (r >> (W - 1)) & 1) r |= ~((1ull << W) - 1);
        }
      }
    }
    memcpy(w.registers + in.operand[0] + (size_t)i * in.register_bytes, &r, in.register_bytes);
  }
}
H(convert_pair) {  // cvt.rn.{f16x2,bf16x2}.f32 d, a, b : a in the upper half
  u32* d = destination<u32>(w, in.operand[0]);
  const float *a = source<float>(w, in.operand[1]), *b = source<float>(w, in.operand[2]);
  u32 t[32];
  bool relu = in.flag & 4;
  for (int i = 0; i < 32; i++) {
    float x = a[i], y = b[i];
    if (relu) {
      x = x > 0 ? x : x != x ? x : 0;
      y = y > 0 ? y : y != y ? y : 0;
    }
    if (in.type == TYPE_BF16X2)
      t[i] = (in.rounding == R_RZ ? bf16_toward_zero(y) : bf16_of_float(y)) |
             (u32)(in.rounding == R_RZ ? bf16_toward_zero(x) : bf16_of_float(x)) << 16;
    else
      t[i] = (in.rounding == R_RZ ? fp16_toward_zero(y) : fp16_of_float(y)) |
             (u32)(in.rounding == R_RZ ? fp16_toward_zero(x) : fp16_of_float(x)) << 16;
  }
  merge_lanes(d, t, m);
}
#define CV(Y, X, NAME, EXPR) \
  {NAME,                     \
   [](Warp& w, const Instruction& in, u32 m) { unary<Y, X>(w, in, m, [](X a) -> Y { return (Y)(EXPR); }); }}
static std::unordered_map<std::string, Handler> COMMON_CONVERSIONS = {
    // key: opcode + register widths dst,src
    CV(s64, s32, "cvt.s64.s32:84", a),
    CV(u64, u32, "cvt.u64.u32:84", a),
    CV(u32, u64, "cvt.u32.u64:48", a),
    CV(float, u16, "cvt.f32.bf16:42", float_of_bf16(a)),
    CV(float, u16, "cvt.f32.f16:42", float_of_fp16(a)),
    CV(float, s32, "cvt.rn.f32.s32:44", a),
    CV(float, u32, "cvt.rn.f32.u32:44", a),
    CV(u16, float, "cvt.rn.bf16.f32:24", bf16_of_float(a)),
    CV(u16, float, "cvt.rn.f16.f32:24", fp16_of_float(a)),
    CV(u16, u32, "cvt.u16.u32:24", a),
    CV(u32, u16, "cvt.u32.u16:42", a),
    CV(s32, s16, "cvt.s32.s16:42", a),
    CV(float, s64, "cvt.rn.f32.s64:48", a),
    CV(float, u64, "cvt.rn.f32.u64:48", a)};

// Pairs of 8-bit numbers (sm_89 and newer). e4m3 has no infinity: 0x7f is its NaN, and conversions stop at 448.
static float float_of_fp8(u8 x, bool e5m2) {
  if (e5m2) return float_of_fp16((u16)(x << 8));
  int exponent = (x >> 3) & 15, mantissa = x & 7;
  if ((x & 0x7f) == 0x7f) return float_of_bits(0x7fffffff);
  float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9);
  return x & 0x80 ? -size : size;
}
static u8 fp8_of_float(float value, bool e5m2) {
  if (value != value) return 0x7f;
  u8 sign = std::signbit(value) ? 0x80 : 0, best = 0;
  float size = std::fabs(value);
  u8 largest = e5m2 ? 0x7b : 0x7e;
  if (size >= float_of_fp8(largest, e5m2)) return sign | largest;
  while (float_of_fp8(best + 1, e5m2) <= size) best++;  // codes ascend with what they mean
  float below = size - float_of_fp8(best, e5m2), above = float_of_fp8(best + 1, e5m2) - size;
  return sign | (above < below || (above == below && (best & 1)) ? best + 1 : best);
}
H(widen_fp8_pair) {  // flag: e5m2
  LANES {
    u16 x = source<u16>(w, in.operand[1])[i];
    u32 low = fp16_of_float(float_of_fp8((u8)x, in.flag)),
        high = fp16_of_float(float_of_fp8((u8)(x >> 8), in.flag));
    destination<u32>(w, in.operand[0])[i] = low | high << 16;
  }
}
H(narrow_to_fp8_pair) {  // the first source in the upper half
  LANES {
    u16 high = fp8_of_float(source<float>(w, in.operand[1])[i], in.flag);
    u16 low = fp8_of_float(source<float>(w, in.operand[2])[i], in.flag);
    destination<u16>(w, in.operand[0])[i] = low | high << 8;
  }
}
