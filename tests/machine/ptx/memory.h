// Loads and stores of global memory, in all modes.
#pragma once

static ALWAYS_INLINE void load_lane(Warp& w, const Instruction& in, int lane, u64 a, u32 n, u8* out, u32 fl) {
  Launch& launch = *w.launch;
  if (launch.race_mode) {
    bool strong = fl & (ORDER_RELAXED | ORDER_ACQUIRE | ORDER_VOLATILE);
    if (strong) acquire_clock(w, a, fl & ORDER_ACQUIRE);
    for (u32 i = 0; i < n; i++)
      note_read(w, in, shadow_page(launch, (a + i) >> 12)[(a + i) & 4095], strong, false, a + i, lane);
  }
  if (launch.weak)
    weak_load(w, a, n, out, fl);
  else
    memcpy(out, (void*)a, n);
}
static ALWAYS_INLINE void store_lane(Warp& w, const Instruction& in, int lane, u64 a, u32 n, const u8* v,
                                     u32 fl) {
  Launch& launch = *w.launch;
  if (launch.race_mode) {
    bool strong = fl & (ORDER_RELAXED | ORDER_RELEASE | ORDER_VOLATILE);
    u8 old[16];
    if (launch.weak) {
      u32 f = CACHE_GLOBAL;
      weak_load(w, a, n, old, f);
    } else
      memcpy(old, (void*)a, n);
    for (u32 i = 0; i < n; i++)
      note_write(w, in, shadow_page(launch, (a + i) >> 12)[(a + i) & 4095], strong, false, a + i, old[i], v[i],
                 lane);
    if (strong || launch.releases.size()) release_clock(w, a, fl & ORDER_RELEASE, false);
  }
  if (launch.weak) {
    if (fl & ORDER_RELEASE) flush_release(launch, *w.program, w.id, 1u << lane);
    weak_store(w, lane, a, n, v, fl);
  } else
    memcpy((void*)a, v, n);
}
static ALWAYS_INLINE void set_element(Warp& w, const Instruction& in, s32 o, int lane, const u8* p) {
  if (o == NO_REGISTER) return;
  u64 x = 0;
  memcpy(&x, p, in.element_bytes);
  if (in.sign_extend) {
    int sh = 64 - 8 * in.element_bytes;
    x = (u64)((s64)(x << sh) >> sh);
  }
  memcpy(w.registers + o + (size_t)lane * in.register_bytes, &x, in.register_bytes);
}
static ALWAYS_INLINE const u8* element_of(Warp& w, const Instruction& in, s32 o, int lane) {
  return source<u8>(w, o) + (size_t)lane * in.register_bytes;
}

static void load_global(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  u32 n = in.vector * in.element_bytes;
  Launch& launch = *w.launch;
  if (!check_global(w, in, m, a, n, false)) return;
  count_sectors(w, m, a, n, COUNT_LOAD_REQUESTS, COUNT_LOAD_SECTORS, COUNT_LOAD_BYTES, true, false);
  if (!launch.slow && in.element_bytes == in.register_bytes) {
    for (int v = 0; v < in.vector; v++) {
      s32 o = in.operand[v];
      if (o == NO_REGISTER) continue;
#define GATHER(X)                                                            \
  {                                                                          \
    X* d = destination<X>(w, o);                                             \
    if (m == ~0u) {                                                          \
      for (int i = 0; i < 32; i++) d[i] = *(const X*)(a[i] + v * sizeof(X)); \
    } else                                                                   \
      for (u32 q = m; q; q &= q - 1) {                                       \
        int i = __builtin_ctz(q);                                            \
        d[i] = *(const X*)(a[i] + v * sizeof(X));                            \
      }                                                                      \
  }
      switch (in.element_bytes) {
        case 2: GATHER(u16) break;
        case 4: GATHER(u32) break;
        case 8: GATHER(u64) break;
        default: {
          char* d = w.registers + o;
          for (int i = 0; i < 32; i++)
            if ((m >> i) & 1)
              memcpy(d + i * in.element_bytes, (void*)(a[i] + v * in.element_bytes), in.element_bytes);
        }
      }
    }
    return;
  }
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      u8 b[32];
      load_lane(w, in, i, a[i], n, b, in.order);
      for (int v = 0; v < in.vector; v++) set_element(w, in, in.operand[v], i, b + v * in.element_bytes);
    }
  if (launch.weak && (in.order & ORDER_ACQUIRE)) w.program->cache.clear();
}
static void store_global(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  u32 n = in.vector * in.element_bytes;
  Launch& launch = *w.launch;
  if (!check_global(w, in, m, a, n, true)) return;
  count_sectors(w, m, a, n, COUNT_STORE_REQUESTS, COUNT_STORE_SECTORS, COUNT_STORE_BYTES, false, true);
  launch.last_change = launch.instructions_run;
  if (!launch.slow && in.element_bytes == in.register_bytes) {
    for (int v = 0; v < in.vector; v++) {
#define SCATTER(X)                            \
  {                                           \
    const X* d = source<X>(w, in.operand[v]); \
    for (u32 q = m; q; q &= q - 1) {          \
      int i = __builtin_ctz(q);               \
      *(X*)(a[i] + v * sizeof(X)) = d[i];     \
    }                                         \
  }
      switch (in.element_bytes) {
        case 2: SCATTER(u16) break;
        case 4: SCATTER(u32) break;
        case 8: SCATTER(u64) break;
        default: {
          const u8* d = source<u8>(w, in.operand[v]);
          for (int i = 0; i < 32; i++)
            if ((m >> i) & 1)
              memcpy((void*)(a[i] + v * in.element_bytes), d + i * in.element_bytes, in.element_bytes);
        }
      }
    }
    return;
  }
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      u8 b[32];
      for (int v = 0; v < in.vector; v++)
        memcpy(b + v * in.element_bytes, element_of(w, in, in.operand[v], i), in.element_bytes);
      store_lane(w, in, i, a[i], n, b, in.order);
    }
}
