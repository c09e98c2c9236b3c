// What only computes: the table from opcodes to functions over 32 lanes.
#pragma once

struct Spec {
  Handler handler;
  const char* w;
  u8 op_class;
};  // w: width in bytes of each operand, destination first ('p' predicate, '1'=.. digits)
static std::unordered_map<std::string, Spec> OPERATIONS;
struct Reg1 {
  Reg1(std::initializer_list<const char*> names, Handler f, const char* w, u8 c) {
    for (auto n : names) OPERATIONS[n] = Spec{f, w, c};
  }
};
#define CAT2(a, b) a##b
#define CAT(a, b) CAT2(a, b)
#define NAMES(...) {__VA_ARGS__}
#define OP2(Y, X, W, program, EXPR, ...)                                    \
  static Reg1 CAT(r_, __COUNTER__)(                                         \
      {__VA_ARGS__},                                                        \
      [](Warp& w, const Instruction& in, u32 m) {                           \
        binary<Y, X, X>(w, in, m, [](X a, X b) -> Y { return (Y)(EXPR); }); \
      },                                                                    \
      W, program);
#define OP2S(Y, X, X2, W, program, EXPR, ...)                                 \
  static Reg1 CAT(r_, __COUNTER__)(                                           \
      {__VA_ARGS__},                                                          \
      [](Warp& w, const Instruction& in, u32 m) {                             \
        binary<Y, X, X2>(w, in, m, [](X a, X2 b) -> Y { return (Y)(EXPR); }); \
      },                                                                      \
      W, program);
#define OP1(Y, X, W, program, EXPR, ...)                           \
  static Reg1 CAT(r_, __COUNTER__)(                                \
      {__VA_ARGS__},                                               \
      [](Warp& w, const Instruction& in, u32 m) {                  \
        unary<Y, X>(w, in, m, [](X a) -> Y { return (Y)(EXPR); }); \
      },                                                           \
      W, program);
#define OP3(Y, X, X3, W, program, EXPR, ...)                                           \
  static Reg1 CAT(r_, __COUNTER__)(                                                    \
      {__VA_ARGS__},                                                                   \
      [](Warp& w, const Instruction& in, u32 m) {                                      \
        ternary<Y, X, X, X3>(w, in, m, [](X a, X b, X3 c) -> Y { return (Y)(EXPR); }); \
      },                                                                               \
      W, program);
#define OP3S(Y, X, X2, X3, W, program, EXPR, ...)                                        \
  static Reg1 CAT(r_, __COUNTER__)(                                                      \
      {__VA_ARGS__},                                                                     \
      [](Warp& w, const Instruction& in, u32 m) {                                        \
        ternary<Y, X, X2, X3>(w, in, m, [](X a, X2 b, X3 c) -> Y { return (Y)(EXPR); }); \
      },                                                                                 \
      W, program);
#define OP2L(Y, X, W, program, EXPR, ...)                                        \
  static Reg1 CAT(r_, __COUNTER__)(                                              \
      {__VA_ARGS__},                                                             \
      [](Warp& w, const Instruction& in, u32 m) {                                \
        binary_by_lane<Y, X>(w, in, m, [](X a, X b) -> Y { return (Y)(EXPR); }); \
      },                                                                         \
      W, program);
#define OP1L(Y, X, W, program, EXPR, ...)                                  \
  static Reg1 CAT(r_, __COUNTER__)(                                        \
      {__VA_ARGS__},                                                       \
      [](Warp& w, const Instruction& in, u32 m) {                          \
        unary_by_lane<Y, X>(w, in, m, [](X a) -> Y { return (Y)(EXPR); }); \
      },                                                                   \
      W, program);

// integers
#define INTS(U, Sg, W2, W3, B, UN, SN, BN)                                                                     \
  OP2(U, U, W3, CLASS_INTEGER, a + b, "add." UN, "add." SN)                                                    \
  OP2(U, U, W3, CLASS_INTEGER, a - b, "sub." UN, "sub." SN)                                                    \
  OP2(U, U, W3, CLASS_INTEGER, (U)((u64)a * (u64)b), "mul.lo." UN, "mul.lo." SN)                               \
  OP3(U, U, U, W3 B, CLASS_INTEGER, (U)((u64)a * (u64)b + c), "mad.lo." UN, "mad.lo." SN)                      \
  OP2(U, U, W3, CLASS_INTEGER, a& b, "and." BN)                                                                \
  OP2(U, U, W3, CLASS_INTEGER, a | b, "or." BN)                                                                \
  OP2(U, U, W3, CLASS_INTEGER, a ^ b, "xor." BN)                                                               \
  OP1(U, U, W2, CLASS_INTEGER, ~a, "not." BN) OP1(U, U, W2, CLASS_INTEGER, a == 0, "cnot." BN)                 \
      OP1(U, U, W2, CLASS_INTEGER, (U)0 - a, "neg." SN)                                                        \
          OP1(U, Sg, W2, CLASS_INTEGER, a < 0 ? (U)0 - (U)a : (U)a, "abs." SN)                                 \
              OP2(Sg, Sg, W3, CLASS_INTEGER, a < b ? a : b, "min." SN)                                         \
                  OP2(U, U, W3, CLASS_INTEGER, a < b ? a : b, "min." UN)                                       \
                      OP2(Sg, Sg, W3, CLASS_INTEGER, a > b ? a : b, "max." SN)                                 \
                          OP2(U, U, W3, CLASS_INTEGER, a > b ? a : b, "max." UN)                               \
                              OP2S(U, U, u32, B B "4", CLASS_INTEGER,                                          \
                                   b >= sizeof(U) * 8 ? (U)0 : (U)(a << (b & (sizeof(U) * 8 - 1))), "shl." BN) \
                                  OP2S(U, U, u32, B B "4", CLASS_INTEGER,                                      \
                                       b >= sizeof(U) * 8 ? (U)0 : (U)(a >> (b & (sizeof(U) * 8 - 1))),        \
                                       "shr." UN, "shr." BN)                                                   \
                                      OP2S(Sg, Sg, u32, B B "4", CLASS_INTEGER,                                \
                                           a >> (b >= sizeof(U) * 8 ? sizeof(U) * 8 - 1 : b), "shr." SN)       \
                                          OP2L(U, U, W3, CLASS_INTEGER, b ? a / b : (U) - 1, "div." UN)        \
                                              OP2L(U, U, W3, CLASS_INTEGER, b ? a % b : a, "rem." UN)          \
                                                  OP2L(Sg, Sg, W3, CLASS_INTEGER,                              \
                                                       b == 0    ? (Sg) - 1                                    \
                                                       : b == -1 ? (Sg)((U)0 - (U)a)                           \
                                                                 : a / b,                                      \
                                                       "div." SN) OP2L(Sg, Sg, W3, CLASS_INTEGER,              \
                                                                       b == 0    ? a                           \
                                                                       : b == -1 ? 0                           \
                                                                                 : a % b,                      \
                                                                       "rem." SN)
INTS(u16, s16, "22", "222", "2", "u16", "s16", "b16")
INTS(u32, s32, "44", "444", "4", "u32", "s32", "b32")
OP2(s32, s32, "444", CLASS_INTEGER, std::max(std::min(a, b), 0), "min.relu.s32")
OP2(s32, s32, "444", CLASS_INTEGER, std::max(std::max(a, b), 0), "max.relu.s32")
INTS(u64, s64, "88", "888", "8", "u64", "s64", "b64")
OP2(u32, u32, "444", CLASS_INTEGER, ((u64)a * b) >> 32, "mul.hi.u32")
OP2(s32, s32, "444", CLASS_INTEGER, ((s64)a * b) >> 32, "mul.hi.s32")
OP2(u64, u64, "888", CLASS_INTEGER, ((u128)a * b) >> 64, "mul.hi.u64")
OP2(s64, s64, "888", CLASS_INTEGER, ((s128)a * b) >> 64, "mul.hi.s64")
OP2(u16, u16, "222", CLASS_INTEGER, ((u32)a * b) >> 16,
    "mul.hi.u16") OP2(s16, s16, "222", CLASS_INTEGER, ((s32)a * b) >> 16,
                      "mul.hi.s16") OP2(u64, u32, "844", CLASS_INTEGER, (u64)a* b, "mul.wide.u32")
    OP2(s64, s32, "844", CLASS_INTEGER, (s64)a* b,
        "mul.wide.s32") OP2(u32, u16, "422", CLASS_INTEGER, (u32)a* b,
                            "mul.wide.u16") OP2(s32, s16, "422", CLASS_INTEGER, (s32)a* b, "mul.wide.s16")
        OP3(u64, u32, u64, "8448", CLASS_INTEGER, (u64)a* b + c,
            "mad.wide.u32") OP3(u64, s32, u64, "8448", CLASS_INTEGER, (u64)((s64)a * b) + c, "mad.wide.s32")
            OP3(u32, u16, u32, "4224", CLASS_INTEGER, (u32)a* b + c,
                "mad.wide.u16") OP3(u32, s16, u32, "4224", CLASS_INTEGER, (u32)((s32)a * b) + c, "mad.wide.s16")
                OP3(u32, u32, u32, "4444", CLASS_INTEGER, (u32)(((u64)a * b) >> 32) + c, "mad.hi.u32")
                    OP3(u32, s32, u32, "4444", CLASS_INTEGER, (u32)(((s64)a * b) >> 32) + c, "mad.hi.s32")
                        OP3(u32, u32, u32, "4444", CLASS_INTEGER, (a > b ? a - b : b - a) + c, "sad.u32")
                            OP3(u32, s32, u32, "4444", CLASS_INTEGER, (u32)(a > b ? a - b : b - a) + c,
                                "sad.s32") OP1(u32, u32, "44", CLASS_INTEGER, __builtin_popcount(a), "popc.b32")
                                OP1(u32, u64, "48", CLASS_INTEGER, __builtin_popcountll(a), "popc.b64")
                                    OP1(u32, u32, "44", CLASS_INTEGER, a ? __builtin_clz(a) : 32, "clz.b32")
                                        OP1(u32, u64, "48", CLASS_INTEGER, a ? __builtin_clzll(a) : 64,
                                            "clz.b64") static ALWAYS_INLINE u32 brev32(u32 v) {
  v = ((v >> 1) & 0x55555555) | ((v & 0x55555555) << 1);
  v = ((v >> 2) & 0x33333333) | ((v & 0x33333333) << 2);
  v = ((v >> 4) & 0x0f0f0f0f) | ((v & 0x0f0f0f0f) << 4);
  return __builtin_bswap32(v);
}
OP1(u32, u32, "44", CLASS_INTEGER, brev32(a), "brev.b32")
OP1(u64, u64, "88", CLASS_INTEGER, ((u64)brev32((u32)a) << 32) | brev32((u32)(a >> 32)), "brev.b64")
OP1(u32, u32, "44", CLASS_INTEGER, a ? 31 - __builtin_clz(a) : ~0u, "bfind.u32", "bfind.b32")
OP1(u32, s32, "44", CLASS_INTEGER, (a < 0 ? ~a : a) ? 31 - __builtin_clz((u32)(a < 0 ? ~a : a)) : ~0u,
    "bfind.s32")
OP1(u32, u32, "44", CLASS_INTEGER, a ? __builtin_clz(a) : ~0u, "bfind.shiftamt.u32")
OP1(u32, u64, "48", CLASS_INTEGER, a ? 63 - __builtin_clzll(a) : ~0u, "bfind.u64")
static ALWAYS_INLINE u64 bfe(u64 a, u32 b, u32 c, int W, bool sg) {
  u32 pos = b & 255, len = c & 255;
  if (!len) return 0;
  u64 sign_extend = 0;
  u32 last = pos + len - 1;
  if (last > (u32)W - 1) last = W - 1;
  if (sg) sign_extend = (a >> last) & 1;
  u64 r = pos >= (u32)W ? (sign_extend ? ~0ull : 0) : a >> pos;
  if (pos + len > (u32)W) len = pos >= (u32)W ? 0 : W - pos;
  if (len < 64) {
    u64 mk = len ? (~0ull >> (64 - len)) : 0;
    r &= mk;
    if (sg && sign_extend) r |= ~mk;
  }
  return r;
}
OP3S(u32, u32, u32, u32, "4444", CLASS_INTEGER, bfe(a, b, c, 32, false), "bfe.u32")
OP3S(u32, u32, u32, u32, "4444", CLASS_INTEGER, bfe(a, b, c, 32, true), "bfe.s32")
OP3S(u64, u64, u32, u32, "8844", CLASS_INTEGER, bfe(a, b, c, 64, false), "bfe.u64")
OP3S(u64, u64, u32, u32, "8844", CLASS_INTEGER, bfe(a, b, c, 64, true), "bfe.s64")
#define H(name) static void name(Warp& w, const Instruction& in, u32 m)
#define LANES                  \
  for (int i = 0; i < 32; i++) \
    if ((m >> i) & 1)
H(insert_bits) {
  u32* d = destination<u32>(w, in.operand[0]);
  auto a = source<u32>(w, in.operand[1]), b = source<u32>(w, in.operand[2]), c = source<u32>(w, in.operand[3]),
       e = source<u32>(w, in.operand[4]);
  LANES {
    u32 pos = c[i] & 255, len = e[i] & 255;
    u32 mk = len >= 32 ? ~0u : (1u << len) - 1;
    mk = pos >= 32 ? 0 : mk << pos;
    d[i] = (b[i] & ~mk) | (pos >= 32 ? 0 : (a[i] << pos) & mk);
  }
}
static Reg1 r_bfi({"bfi.b32"}, insert_bits, "44444", CLASS_INTEGER);
static ALWAYS_INLINE u32 prmt(u32 a, u32 b, u32 s) {
  u64 x = a | (u64)b << 32;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 q = (s >> (4 * k)) & 15;
    u32 by = (x >> (8 * (q & 7))) & 255;
    if (q & 8) by = by & 128 ? 255 : 0;
    r |= by << (8 * k);
  }
  return r;
}
OP3(u32, u32, u32, "4444", CLASS_INTEGER, prmt(a, b, c), "prmt.b32")
static ALWAYS_INLINE u32 lop3(u32 a, u32 b, u32 c, u32 lut) {
  u32 r = 0;
  if (lut & 1) r |= ~a & ~b & ~c;
  if (lut & 2) r |= ~a & ~b & c;
  if (lut & 4) r |= ~a & b & ~c;
  if (lut & 8) r |= ~a & b & c;
  if (lut & 16) r |= a & ~b & ~c;
  if (lut & 32) r |= a & ~b & c;
  if (lut & 64) r |= a & b & ~c;
  if (lut & 128) r |= a & b & c;
  return r;
}
H(logic_of_three) {
  u32* d = destination<u32>(w, in.operand[0]);
  auto a = source<u32>(w, in.operand[1]), b = source<u32>(w, in.operand[2]), c = source<u32>(w, in.operand[3]),
       l = source<u32>(w, in.operand[4]);
  u32 t[32];
  for (int i = 0; i < 32; i++) t[i] = lop3(a[i], b[i], c[i], l[i]);
  merge_lanes(d, t, m);
}
static Reg1 r_lop3({"lop3.b32"}, logic_of_three, "44444", CLASS_INTEGER);
OP3(u32, u32, u32, "4444", CLASS_INTEGER, (u32)((((u64)b << 32) | a) << (c & 31) >> 32), "shf.l.wrap.b32")
OP3(u32, u32, u32, "4444", CLASS_INTEGER, (u32)((((u64)b << 32) | a) >> (c & 31)), "shf.r.wrap.b32")
OP3(u32, u32, u32, "4444", CLASS_INTEGER, c >= 32 ? a : (u32)((((u64)b << 32) | a) << c >> 32),
    "shf.l.clamp.b32")
OP3(u32, u32, u32, "4444", CLASS_INTEGER, c >= 32 ? b : (u32)((((u64)b << 32) | a) >> c), "shf.r.clamp.b32")
// moves and selects
OP1(u16, u16, "22", CLASS_MOVE, a, "mov.b16", "mov.u16", "mov.s16", "mov.f16")
OP1(u32, u32, "44", CLASS_MOVE, a, "mov.b32", "mov.u32", "mov.s32", "mov.f32")
OP1(u64, u64, "88", CLASS_MOVE, a, "mov.b64", "mov.u64", "mov.s64", "mov.f64", "cvta.global.u64",
    "cvta.to.global.u64")
template <class X>
static void select_by_predicate(Warp& w, const Instruction& in, u32 m) {
  X* d = destination<X>(w, in.operand[0]);
  const X *a = source<X>(w, in.operand[1]), *b = source<X>(w, in.operand[2]);
  u32 p = *source<u32>(w, in.operand[3]);
  X t[32];
  for (int i = 0; i < 32; i++) t[i] = (p >> i) & 1 ? a[i] : b[i];
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    merge_lanes(d, t, m);
}
static Reg1 r_selp2({"selp.b16", "selp.u16", "selp.s16", "selp.f16"}, select_by_predicate<u16>, "222p",
                    CLASS_MOVE),
    r_selp4({"selp.b32", "selp.u32", "selp.s32", "selp.f32"}, select_by_predicate<u32>, "444p", CLASS_MOVE),
    r_selp8({"selp.b64", "selp.u64", "selp.s64", "selp.f64"}, select_by_predicate<u64>, "888p", CLASS_MOVE);
// predicates
#define PRED(EXPR, W, ...)                                                         \
  static Reg1 CAT(r_, __COUNTER__)(                                                \
      {__VA_ARGS__},                                                               \
      [](Warp& w, const Instruction& in, u32 m) {                                  \
        u32* d = destination<u32>(w, in.operand[0]);                               \
        u32 a = *source<u32>(w, in.operand[1]);                                    \
        u32 b = in.operand[2] == NO_REGISTER ? 0 : *source<u32>(w, in.operand[2]); \
        (void)b;                                                                   \
        *d = (*d & ~m) | ((EXPR) & m);                                             \
      },                                                                           \
      W, CLASS_PREDICATE);
PRED(a& b, "ppp", "and.pred")
PRED(a | b, "ppp", "or.pred")
PRED(a ^ b, "ppp", "xor.pred")
PRED(~a, "pp", "not.pred")
PRED(a, "pp", "mov.pred")
    // comparisons
    template <class X, class F>
    static ALWAYS_INLINE void cmp(Warp& w, const Instruction& in, u32 m, F f) {
  const X *a = source<X>(w, in.operand[1]), *b = source<X>(w, in.operand[2]);
  u32 r = 0;
  if constexpr (sizeof(X) == 4) {
    alignas(32) u32 t[32];
    for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i]) ? ~0u : 0;
    for (int q = 0; q < 4; q++) r |= (u32)_mm256_movemask_ps(_mm256_load_ps((float*)t + 8 * q)) << (8 * q);
  } else if constexpr (sizeof(X) == 8) {
    alignas(32) u64 t[32];
    for (int i = 0; i < 32; i++) t[i] = f(a[i], b[i]) ? ~0ull : 0;
    for (int q = 0; q < 8; q++) r |= (u32)_mm256_movemask_pd(_mm256_load_pd((double*)t + 4 * q)) << (4 * q);
  } else
    for (int i = 0; i < 32; i++) r |= (u32)f(a[i], b[i]) << i;
  u32* d = destination<u32>(w, in.operand[0]);
  *d = (*d & ~m) | (r & m);
}
#define CMP1(X, W, NAME, EXPR)                                                                                \
  static Reg1 CAT(r_, __COUNTER__)(                                                                           \
      {NAME},                                                                                                 \
      [](Warp& w, const Instruction& in, u32 m) { cmp<X>(w, in, m, [](X a, X b) -> bool { return EXPR; }); }, \
      W, CLASS_PREDICATE);
#define CMPI(X, W, T)              \
  CMP1(X, W, "setp.eq." T, a == b) \
  CMP1(X, W, "setp.ne." T, a != b) \
  CMP1(X, W, "setp.lt." T, a < b)  \
  CMP1(X, W, "setp.le." T, a <= b) CMP1(X, W, "setp.gt." T, a > b) CMP1(X, W, "setp.ge." T, a >= b)
#define CMPU(X, W, T)             \
  CMPI(X, W, T)                   \
  CMP1(X, W, "setp.lo." T, a < b) \
  CMP1(X, W, "setp.ls." T, a <= b) CMP1(X, W, "setp.hi." T, a > b) CMP1(X, W, "setp.hs." T, a >= b)
CMPI(s16, "p22", "s16")
CMPU(u16, "p22", "u16")
CMPI(u16, "p22", "b16")
CMPI(s32, "p44", "s32")
CMPU(u32, "p44", "u32") CMPI(u32, "p44", "b32") CMPI(s64, "p88", "s64") CMPU(u64, "p88", "u64")
    CMPI(u64, "p88", "b64")
#define CMPF(X, W, T)                                                                   \
  CMP1(X, W, "setp.eq." T, a == b)                                                      \
  CMP1(X, W, "setp.ne." T, (a < b) | (a > b))                                           \
  CMP1(X, W, "setp.lt." T, a < b)                                                       \
  CMP1(X, W, "setp.le." T, a <= b)                                                      \
  CMP1(X, W, "setp.gt." T, a > b) CMP1(X, W, "setp.ge." T, a >= b)                      \
      CMP1(X, W, "setp.equ." T, !((a < b) | (a > b))) CMP1(X, W, "setp.neu." T, a != b) \
          CMP1(X, W, "setp.ltu." T, !(a >= b)) CMP1(X, W, "setp.leu." T, !(a > b))      \
              CMP1(X, W, "setp.gtu." T, !(a <= b)) CMP1(X, W, "setp.geu." T, !(a < b))  \
                  CMP1(X, W, "setp.num." T, (a == a) & (b == b))                        \
                      CMP1(X, W, "setp.nan." T, (a != a) | (b != b))
        CMPF(float, "p44", "f32") CMPF(double, "p88", "f64")
#define CMPH(T, CV)                                                                                            \
  CMP1(u16, "p22", "setp.eq." T, CV(a) == CV(b))                                                               \
  CMP1(u16, "p22", "setp.ne." T, (CV(a) < CV(b)) | (CV(a) > CV(b)))                                            \
  CMP1(u16, "p22", "setp.lt." T, CV(a) < CV(b))                                                                \
  CMP1(u16, "p22", "setp.le." T, CV(a) <= CV(b))                                                               \
  CMP1(u16, "p22", "setp.gt." T, CV(a) > CV(b))                                                                \
  CMP1(u16, "p22", "setp.ge." T, CV(a) >= CV(b)) CMP1(u16, "p22", "setp.neu." T, CV(a) != CV(b))               \
      CMP1(u16, "p22", "setp.ltu." T, !(CV(a) >= CV(b))) CMP1(u16, "p22", "setp.leu." T, !(CV(a) > CV(b)))     \
          CMP1(u16, "p22", "setp.gtu." T, !(CV(a) <= CV(b))) CMP1(u16, "p22", "setp.geu." T, !(CV(a) < CV(b))) \
              CMP1(u16, "p22", "setp.equ." T, !((CV(a) < CV(b)) | (CV(a) > CV(b))))                            \
                  CMP1(u16, "p22", "setp.nan." T, (CV(a) != CV(a)) | (CV(b) != CV(b)))                         \
                      CMP1(u16, "p22", "setp.num." T, (CV(a) == CV(a)) & (CV(b) == CV(b)))
            CMPH("f16", float_of_fp16) CMPH("bf16", float_of_bf16)
    // floats
    OP2(float, float, "444", CLASS_FLOAT, a + b, "add.f32", "add.rn.f32") OP2(
        float, float, "444", CLASS_FLOAT, a - b, "sub.f32",
        "sub.rn.f32") OP2(float, float, "444", CLASS_FLOAT, a* b, "mul.f32",
                          "mul.rn.f32") OP3(float, float, float, "4444", CLASS_FLOAT, __builtin_fmaf(a, b, c),
                                            "fma.rn.f32", "mad.rn.f32") OP2(float, float, "444", CLASS_FLOAT,
                                                                            flushed(flushed(a) + flushed(b)),
                                                                            "add.ftz.f32", "add.rn.ftz.f32")
        OP2(float, float, "444", CLASS_FLOAT, flushed(flushed(a) - flushed(b)), "sub.ftz.f32",
            "sub.rn.ftz.f32") OP2(float, float, "444", CLASS_FLOAT, flushed(flushed(a) * flushed(b)),
                                  "mul.ftz.f32",
                                  "mul.rn.ftz.f32") OP3(float, float, float, "4444", CLASS_FLOAT,
                                                        flushed(__builtin_fmaf(flushed(a), flushed(b),
                                                                               flushed(c))),
                                                        "fma.rn.ftz.f32")
            OP1(u32, u32, "44", CLASS_FLOAT, a ^ 0x80000000u, "neg.f32") OP1(
                u32, u32, "44",
                CLASS_FLOAT, a & 0x7fffffffu,
                "abs.f32") OP1(float, float, "44", CLASS_FLOAT,
                               flushed(float_of_bits(bits_of_float(a) & 0x7fffffffu)),
                               "abs.ftz.f32") OP1(float, float, "44", CLASS_FLOAT, flushed(-a), "neg.ftz.f32")
                OP2(float, float, "444", CLASS_FLOAT, max_number(a, b),
                    "max.f32") OP2(float, float, "444", CLASS_FLOAT, min_number(a, b),
                                   "min.f32") OP2(float, float, "444", CLASS_FLOAT,
                                                  max_or_nan(a, b), "max.NaN.f32")
                    OP2(float, float, "444", CLASS_FLOAT, min_or_nan(a, b),
                        "min.NaN.f32") OP2(float, float, "444", CLASS_FLOAT,
                                           flushed(max_number(flushed(a), flushed(b))),
                                           "max.ftz.f32") OP2(float, float, "444", CLASS_FLOAT,
                                                              flushed(min_number(flushed(a), flushed(b))),
                                                              "min.ftz.f32")
                        OP2(float, float, "444", CLASS_SPECIAL, a / b, "div.rn.f32", "div.full.f32",
                            "div.approx.f32") OP2(float, float, "444", CLASS_SPECIAL,
                                                  flushed(flushed(a) / flushed(b)), "div.full.ftz.f32",
                                                  "div.approx.ftz.f32", "div.rn.ftz.f32")
                            OP1(float, float, "44", CLASS_SPECIAL, 1.0f / a, "rcp.approx.f32", "rcp.rn.f32") OP1(
                                float, float, "44",
                                CLASS_SPECIAL, flushed(1.0f / flushed(a)), "rcp.approx.ftz.f32",
                                "rcp.rn.ftz.f32") OP1(float, float, "44", CLASS_SPECIAL, __builtin_sqrtf(a),
                                                      "sqrt.rn.f32", "sqrt.approx.f32")
                                OP1(float, float, "44", CLASS_SPECIAL, flushed(__builtin_sqrtf(flushed(a))),
                                    "sqrt.rn.ftz.f32",
                                    "sqrt.approx.ftz.f32") OP1(float, float, "44",
                                                               CLASS_SPECIAL, (float)(1.0 / __builtin_sqrt((double)a)),
                                                               "rsqrt.approx.f32")
                                    OP1(float, float, "44", CLASS_SPECIAL,
                                        flushed((float)(1.0 / __builtin_sqrt((double)flushed(a)))),
                                        "rsqrt.approx.ftz.f32")
                                        OP1(float, float, "44", CLASS_SPECIAL, ex2f(a),
                                            "ex2.approx.f32") OP1(float, float, "44", CLASS_SPECIAL,
                                                                  flushed(ex2f(flushed(a))),
                                                                  "ex2.approx.ftz.f32")
                                            OP1L(float, float, "44", CLASS_SPECIAL, log2f(a), "lg2.approx.f32") OP1L(
                                                float, float, "44",
                                                CLASS_SPECIAL, log2f(flushed(a)), "lg2.approx.ftz.f32")
                                                OP1L(float, float, "44", CLASS_SPECIAL, sinf(a),
                                                     "sin.approx.f32", "sin.approx.ftz.f32")
                                                    OP1L(float, float, "44", CLASS_SPECIAL, cosf(a),
                                                         "cos.approx.f32", "cos.approx.ftz.f32")
                                                        OP1L(
                                                            float, float, "44",
                                                            CLASS_SPECIAL, tanhf(a),
                                                            "tanh.approx.f32") OP2(u32, u32, "444", CLASS_FLOAT,
                                                                                   (a & 0x80000000u) |
                                                                                       (b & 0x7fffffffu),
                                                                                   "copysign.f32")
                                                            OP2(double, double, "888", CLASS_FLOAT, a + b,
                                                                "add.f64",
                                                                "add.rn.f64") OP2(double, double, "888",
                                                                                  CLASS_FLOAT, a - b, "sub.f64",
                                                                                  "sub.rn.f64")
                                                                OP2(double, double, "888", CLASS_FLOAT, a* b,
                                                                    "mul.f64",
                                                                    "mul.rn.f64") OP3(double, double, double,
                                                                                      "8888",
                                                                                      CLASS_FLOAT,
                                                                                      __builtin_fma(a, b, c),
                                                                                      "fma.rn.f64")
                                                                    OP1(u64, u64, "88", CLASS_FLOAT,
                                                                        a ^ (1ull << 63),
                                                                        "neg.f64") OP1(u64, u64,
                                                                                       "88", CLASS_FLOAT,
                                                                                       a & ~(1ull << 63),
                                                                                       "abs.f64")
                                                                        OP2(double, double, "888", CLASS_FLOAT,
                                                                            fmax(a, b),
                                                                            "max.f64") OP2(double, double,
                                                                                           "888", CLASS_FLOAT,
                                                                                           fmin(a, b),
                                                                                           "min.f64")
                                                                            OP2(double, double, "888",
                                                                                CLASS_SPECIAL, a / b,
                                                                                "div.rn.f64")
                                                                                OP1(double, double, "88",
                                                                                    CLASS_SPECIAL, 1.0 / a,
                                                                                    "rcp.rn.f64")
                                                                                    OP1(double, double, "88",
                                                                                        CLASS_SPECIAL,
                                                                                        __builtin_sqrt(a),
                                                                                        "sqrt.rn.f64")
#define HALFS(T, TO, FROM, FROMD)                                                                              \
  OP2(u16, u16, "222", CLASS_FLOAT, FROM(TO(a) + TO(b)), "add." T, "add.rn." T)                                \
  OP2(u16, u16, "222", CLASS_FLOAT, FROM(TO(a) - TO(b)), "sub." T, "sub.rn." T)                                \
  OP2(u16, u16, "222", CLASS_FLOAT, FROM(TO(a) * TO(b)), "mul." T, "mul.rn." T)                                \
  OP3(u16, u16, u16, "2222", CLASS_FLOAT, FROMD((double)TO(a) * TO(b) + TO(c)), "fma.rn." T)                   \
  OP1(u16, u16, "22", CLASS_FLOAT, a ^ 0x8000, "neg." T) OP1(                                                  \
      u16, u16, "22", CLASS_FLOAT, a & 0x7fff, "abs." T) OP2(u16, u16, "222", CLASS_FLOAT,                     \
                                                             FROM(max_number(TO(a), TO(b))), "max." T)         \
      OP2(u16, u16, "222", CLASS_FLOAT, FROM(min_number(TO(a), TO(b))), "min." T) OP2(                         \
          u16, u16, "222", CLASS_FLOAT, FROM(max_or_nan(TO(a), TO(b))), "max.NaN." T)                          \
          OP2(u16, u16, "222", CLASS_FLOAT, FROM(min_or_nan(TO(a), TO(b))), "min.NaN." T) OP2(                 \
              u32, u32, "444", CLASS_FLOAT,                                                                    \
              FROM(TO((u16)a) + TO((u16)b)) | (u32)FROM(TO((u16)(a >> 16)) + TO((u16)(b >> 16))) << 16,        \
              "add." T "x2", "add.rn." T "x2")                                                                 \
              OP2(u32, u32, "444", CLASS_FLOAT,                                                                \
                  FROM(TO((u16)a) - TO((u16)b)) | (u32)FROM(TO((u16)(a >> 16)) - TO((u16)(b >> 16))) << 16,    \
                  "sub." T "x2", "sub.rn." T "x2")                                                             \
                  OP2(u32, u32, "444", CLASS_FLOAT,                                                            \
                      FROM(TO((u16)a) * TO((u16)b)) | (u32)FROM(TO((u16)(a >> 16)) * TO((u16)(b >> 16)))       \
                                                          << 16,                                               \
                      "mul." T "x2", "mul.rn." T "x2")                                                         \
                      OP3(u32, u32, u32, "4444", CLASS_FLOAT,                                                  \
                          FROMD((double)TO((u16)a) * TO((u16)b) + TO((u16)c)) |                                \
                              (u32)FROMD((double)TO((u16)(a >> 16)) * TO((u16)(b >> 16)) + TO((u16)(c >> 16))) \
                                  << 16,                                                                       \
                          "fma.rn." T "x2") OP1(u32, u32, "44", CLASS_FLOAT, a ^ 0x80008000u, "neg." T "x2")   \
                          OP1(u32, u32, "44", CLASS_FLOAT, a & 0x7fff7fffu, "abs." T "x2")                     \
                              OP2(u32, u32, "444", CLASS_FLOAT,                                                \
                                  FROM(max_number(TO((u16)a), TO((u16)b))) |                                   \
                                      (u32)FROM(max_number(TO((u16)(a >> 16)), TO((u16)(b >> 16)))) << 16,     \
                                  "max." T "x2")                                                               \
                                  OP2(u32, u32, "444", CLASS_FLOAT,                                            \
                                      FROM(min_number(TO((u16)a), TO((u16)b))) |                               \
                                          (u32)FROM(min_number(TO((u16)(a >> 16)), TO((u16)(b >> 16)))) << 16, \
                                      "min." T "x2")
                                                                                        HALFS("f16",
                                                                                              float_of_fp16,
                                                                                              fp16_of_float,
                                                                                              fp16_of_double)
                                                                                            HALFS(
                                                                                                "bf16",
                                                                                                float_of_bf16,
                                                                                                bf16_of_float,
                                                                                                bf16_of_double)

    // ---------------------------------------------------------------- conversions
