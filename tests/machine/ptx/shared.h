// Shared memory: loads, stores, matrices of it.
#pragma once

static bool check_shared(Warp& w, const Instruction& in, u32 m, const u64* a, u32 n) {
  u64 mx = 0, al = 0;
  Launch& launch = *w.launch;
  for (int i = 0; i < 32; i++) {
    u64 y = (m >> i) & 1 ? a[i] : 0;
    mx = y > mx ? y : mx;
    al |= y;
  }
  if (al & (n - 1)) {
    launch.report("misaligned", w, in, "shared access");
    launch.fail(3, "misaligned shared access" + launch.where(w, in));
    return false;
  }
  if (mx + n > w.program->shared_bytes) {
    char b[128];
    snprintf(b, sizeof b, "shared access at %#llx + %u, size %zu", (unsigned long long)mx, n,
             w.program->shared_bytes);
    launch.report("bounds", w, in, b);
    launch.fail(2, std::string(b) + launch.where(w, in));
    return false;
  }
  return true;
}
static void bank_conflicts(Warp& w, u32 m, const u64* a, u32 n, int which) {
  if (w.launch->config->count < 2) return;
  u32 words = n < 4 ? 1 : n / 4, lanes = words <= 1 ? 32 : 32 / words;
  u64 waves = 0;
  for (u32 g = 0; g < 32; g += lanes) {
    u64 seen[32][8];
    u8 cnt[32] = {0};
    int mx = 0;
    for (u32 i = g; i < g + lanes; i++)
      if ((m >> i) & 1)
        for (u32 q = 0; q < words; q++) {
          u64 x = (a[i] >> 2) + q;
          u32 b = x & 31;
          bool hit = false;
          for (int t = 0; t < cnt[b] && t < 8; t++) hit |= seen[b][t] == x;
          if (!hit) {
            if (cnt[b] < 8) seen[b][cnt[b]] = x;
            cnt[b]++;
            mx = mx > cnt[b] ? mx : cnt[b];
          }
        }
    waves += mx > 1 ? mx - 1 : 0;
  }
  w.launch->counters[which] += waves;
}
static ALWAYS_INLINE void note_shared_access(Warp& w, const Instruction& in, int lane, u64 a, u32 n, bool write,
                                             const u8* v) {
  Launch& launch = *w.launch;
  Program& program = *w.program;
  if (launch.race_mode)
    for (u32 i = 0; i < n; i++) {
      if (write)
        note_write(w, in, program.shadow[a + i], false, true, a + i, (u8)program.shared[a + i], v[i], lane);
      else
        note_read(w, in, program.shadow[a + i], false, true, a + i, lane);
    }
  if (launch.config->uninitialised) {
    if (write)
      memset(&program.initialised[a], 1, n);
    else
      for (u32 i = 0; i < n; i++)
        if (!program.initialised[a + i]) {
          launch.counters[COUNT_UNINITIALISED]++;
          if (launch.config->uninitialised > 1)
            launch.report("uninitialised", w, in, "byte " + std::to_string(a + i));
          break;
        }
  }
}
static void load_shared(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  u32 n = in.vector * in.element_bytes;
  Launch& launch = *w.launch;
  char* sh = w.program->shared;
  if (!check_shared(w, in, m, a, n)) return;
  launch.counters[COUNT_SHARED_LOADS]++;
  bank_conflicts(w, m, a, n, COUNT_SHARED_LOAD_CONFLICTS);
  if (launch.race_mode | launch.config->uninitialised)
    for (int i = 0; i < 32; i++)
      if ((m >> i) & 1) note_shared_access(w, in, i, a[i], n, false, nullptr);
  if (in.element_bytes == in.register_bytes &&
      (in.element_bytes == 4 || in.element_bytes == 8 || in.element_bytes == 2)) {
    for (int v = 0; v < in.vector; v++) {
      s32 o = in.operand[v];
      if (o == NO_REGISTER) continue;
#define SGATHER(X)                                   \
  {                                                  \
    X* d = destination<X>(w, o);                     \
    for (u32 q = m; q; q &= q - 1) {                 \
      int i = __builtin_ctz(q);                      \
      d[i] = *(const X*)(sh + a[i] + v * sizeof(X)); \
    }                                                \
  }
      if (in.element_bytes == 4) SGATHER(u32) else if (in.element_bytes == 8) SGATHER(u64) else SGATHER(u16)
    }
    return;
  }
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1)
      for (int v = 0; v < in.vector; v++)
        set_element(w, in, in.operand[v], i, (u8*)sh + a[i] + v * in.element_bytes);
}
static void store_shared(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  u32 n = in.vector * in.element_bytes;
  Launch& launch = *w.launch;
  char* sh = w.program->shared;
  if (!check_shared(w, in, m, a, n)) return;
  launch.counters[COUNT_SHARED_STORES]++;
  bank_conflicts(w, m, a, n, COUNT_SHARED_STORE_CONFLICTS);
  bool slow = launch.race_mode | launch.config->uninitialised;
  for (u32 q = m; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u8 b[32];
    for (int v = 0; v < in.vector; v++)
      memcpy(b + v * in.element_bytes, element_of(w, in, in.operand[v], i), in.element_bytes);
    if (slow) note_shared_access(w, in, i, a[i], n, true, b);
    memcpy(sh + a[i], b, n);
  }
}
static void load_matrix(Warp& w, const Instruction& in,
                        u32 m) {  // vector matrices of 8x8 b16; flag: transposed
  alignas(32) u64 a[32];
  addresses(w, in, a);
  Launch& launch = *w.launch;
  char* sh = w.program->shared;
  u32 need = in.vector == 4 ? ~0u : in.vector == 2 ? 0xffffu : 0xffu;
  if (!check_shared(w, in, need, a, 16)) return;
  launch.counters[COUNT_SHARED_LOADS] += in.vector;
  if (launch.race_mode | launch.config->uninitialised)
    for (int i = 0; i < 8 * in.vector; i++) note_shared_access(w, in, i, a[i], 16, false, nullptr);
  for (int v = 0; v < in.vector; v++) {
    u32* d = destination<u32>(w, in.operand[v]);
    for (int i = 0; i < 32; i++) {
      if (!in.flag) {
        d[i] = *(u32*)(sh + a[8 * v + (i >> 2)] + 4 * (i & 3));
      } else {
        int r = 2 * (i & 3), c = i >> 2;
        d[i] = *(u16*)(sh + a[8 * v + r] + 2 * c) | (u32)(*(u16*)(sh + a[8 * v + r + 1] + 2 * c)) << 16;
      }
    }
  }
}
static void store_matrix(Warp& w, const Instruction& in, u32 m) {  // the way back
  alignas(32) u64 a[32];
  addresses(w, in, a);
  Launch& launch = *w.launch;
  u32 need = in.vector == 4 ? ~0u : in.vector == 2 ? 0xffffu : 0xffu;
  if (!check_shared(w, in, need, a, 16)) return;
  launch.counters[COUNT_SHARED_STORES] += in.vector;
  for (int v = 0; v < in.vector; v++) {
    const u32* value = source<u32>(w, in.operand[v]);
    u16 rows[8][8];
    for (int i = 0; i < 32; i++)
      for (int half = 0; half < 2; half++) {
        int along = 2 * (i & 3) + half, across = i >> 2;
        rows[in.flag ? along : across][in.flag ? across : along] = (u16)(value[i] >> (16 * half));
      }
    for (int r = 0; r < 8; r++) {
      if (launch.race_mode | launch.config->uninitialised)
        note_shared_access(w, in, 8 * v + r, a[8 * v + r], 16, true, (const u8*)rows[r]);
      memcpy(w.program->shared + a[8 * v + r], rows[r], 16);
    }
  }
}
