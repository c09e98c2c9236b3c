// Atomic operations, and fences.
#pragma once

enum AOp : u8 { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
static u64 atomic_result(const Instruction& in, u64 old, u64 b, u64 c) {
  switch (in.variant) {
    case A_ADD:
      switch (in.type) {
        case TYPE_F32: return bits_of_float(float_of_bits((u32)old) + float_of_bits((u32)b));
        case TYPE_F64: {
          double x, y;
          memcpy(&x, &old, 8);
          memcpy(&y, &b, 8);
          return bits_of_double(x + y);
        }
        case TYPE_F16: return fp16_of_float(float_of_fp16((u16)old) + float_of_fp16((u16)b));
        case TYPE_BF16: return bf16_of_float(float_of_bf16((u16)old) + float_of_bf16((u16)b));
        case TYPE_F16X2:
          return fp16_of_float(float_of_fp16((u16)old) + float_of_fp16((u16)b)) |
                 (u32)fp16_of_float(float_of_fp16((u16)(old >> 16)) + float_of_fp16((u16)(b >> 16))) << 16;
        case TYPE_BF16X2:
          return bf16_of_float(float_of_bf16((u16)old) + float_of_bf16((u16)b)) |
                 (u32)bf16_of_float(float_of_bf16((u16)(old >> 16)) + float_of_bf16((u16)(b >> 16))) << 16;
        default: return old + b;
      }
    case A_MIN:
      switch (in.type) {
        case TYPE_S32: return (u32)std::min((s32)old, (s32)b);
        case TYPE_S64: return (u64)std::min((s64)old, (s64)b);
        case TYPE_U32:
        case TYPE_B32: return std::min((u32)old, (u32)b);
        default: return std::min(old, b);
      }
    case A_MAX:
      switch (in.type) {
        case TYPE_S32: return (u32)std::max((s32)old, (s32)b);
        case TYPE_S64: return (u64)std::max((s64)old, (s64)b);
        case TYPE_U32:
        case TYPE_B32: return std::max((u32)old, (u32)b);
        default: return std::max(old, b);
      }
    case A_AND: return old & b;
    case A_OR: return old | b;
    case A_XOR: return old ^ b;
    case A_EXCH: return b;
    case A_CAS: return old == b ? c : old;
    case A_INC: return (u32)old >= (u32)b ? 0 : old + 1;
    case A_DEC: return (u32)old == 0 || (u32)old > (u32)b ? b : old - 1;
  }
  return old;
}
static void atomic_global(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  Launch& launch = *w.launch;
  u32 n = in.element_bytes;
  if (!check_global(w, in, m, a, n, true)) return;
  count_sectors(w, m, a, n, COUNT_ATOMIC_REQUESTS, COUNT_ATOMIC_SECTORS, -1, true, true);
  launch.counters[COUNT_ATOMIC_THREADS] += __builtin_popcount(m);
  if (launch.weak && (in.order & ORDER_RELEASE)) flush_release(launch, *w.program, w.id, m);
  // the lanes of one request take place in a random rotation
  int r = launch.rng.below(32);
  for (int j = 0; j < 32; j++) {
    int i = (j + r) & 31;
    if (!((m >> i) & 1)) continue;
    u64 old = 0, b = 0, c = 0;
    memcpy(&b, source<u8>(w, in.operand[1]) + (size_t)i * in.register_bytes, in.element_bytes);
    if (in.variant == A_CAS)
      memcpy(&c, source<u8>(w, in.operand[2]) + (size_t)i * in.register_bytes, in.element_bytes);
    if (launch.weak) {
      for (u64 k = a[i] >> 3; k <= (a[i] + n - 1) >> 3; k++) flush_word(launch, *w.program, k);
      w.program->cache.erase(a[i] >> 5);
    }
    memcpy(&old, (void*)a[i], n);
    u64 nw = atomic_result(in, old, b, c);
    if (launch.race_mode) {
      acquire_clock(w, a[i], in.order & ORDER_ACQUIRE);
      bool changes = !(in.variant == A_CAS && old != b);
      for (u32 q = 0; q < n; q++) {
        ShadowByte& s = shadow_page(launch, (a[i] + q) >> 12)[(a[i] + q) & 4095];
        note_read(w, in, s, true, false, a[i] + q, i);
        if (changes) note_write(w, in, s, true, false, a[i] + q, 0, 1, i, true);
      }
      release_clock(w, a[i], in.order & ORDER_RELEASE, true);
    }
    if (memcmp((void*)a[i], &nw, n)) launch.last_change = launch.instructions_run;
    memcpy((void*)a[i], &nw, n);
    if (in.operand[0] != NO_REGISTER)
      memcpy(w.registers + in.operand[0] + (size_t)i * in.register_bytes, &old, in.register_bytes);
  }
  if (launch.weak && (in.order & ORDER_ACQUIRE)) w.program->cache.clear();
}
static void atomic_shared(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  u32 n = in.element_bytes;
  char* sh = w.program->shared;
  Launch& launch = *w.launch;
  if (!check_shared(w, in, m, a, n)) return;
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      u64 old = 0, b = 0, c = 0;
      memcpy(&b, source<u8>(w, in.operand[1]) + (size_t)i * in.register_bytes, n);
      if (in.variant == A_CAS) memcpy(&c, source<u8>(w, in.operand[2]) + (size_t)i * in.register_bytes, n);
      memcpy(&old, sh + a[i], n);
      u64 nw = atomic_result(in, old, b, c);
      if (launch.race_mode)
        for (u32 q = 0; q < n; q++) {
          note_read(w, in, w.program->shadow[a[i] + q], true, true, a[i] + q, i);
          note_write(w, in, w.program->shadow[a[i] + q], true, true, a[i] + q, 0, 1, i, true);
        }
      if (launch.config->uninitialised) memset(&w.program->initialised[a[i]], 1, n);
      memcpy(sh + a[i], &nw, n);
      if (in.operand[0] != NO_REGISTER)
        memcpy(w.registers + in.operand[0] + (size_t)i * in.register_bytes, &old, in.register_bytes);
    }
}
static void fence(Warp& w, const Instruction& in, u32 m) {  // scope 0 cta, 1 gpu, 2 sys
  if (!m) return;
  Launch& launch = *w.launch;
  if (in.scope == 0) return;
  if (launch.weak) {
    flush_release(launch, *w.program, w.id, m);
    w.program->cache.clear();
  }
  if (launch.race_mode) fence_clock(w);
}
