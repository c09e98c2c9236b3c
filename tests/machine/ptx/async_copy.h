// Asynchronous copies from global to shared memory: they land at once, or when somebody waits for them.
#pragma once

static void land_copy(Warp& w, const AsyncCopy& c) {
  Launch& launch = *w.launch;
  Program& program = *w.program;
  const Instruction& in = *c.in;
  for (u32 q = c.mask; q; q &= q - 1) {
    int i = __builtin_ctz(q);
    u8 b[16] = {0};
    u32 n = c.read_bytes[i];
    if (n) load_lane(w, in, i, c.g[i], n, b, in.order);
    if (launch.race_mode | launch.config->uninitialised) note_shared_access(w, in, i, c.s[i], c.size, true, b);
    memcpy(program.shared + c.s[i], b, c.size);
  }
}
static void copy_async(Warp& w, const Instruction& in, u32 m) {
  // base: shared address register (immediate), o[0]: global address register, o[1]: source size or NO_REGISTER;
  // vector = size; variant: offset of the global address in `target`
  if (!m) return;
  AsyncCopy c;
  Launch& launch = *w.launch;
  c.mask = m;
  c.size = in.vector;
  c.in = &in;
  c.line = in.line;
  alignas(32) u64 a[32];
  addresses(w, in, a);
  const u64* g = source<u64>(w, in.operand[0]);
  u32 read = 0;
  alignas(32) u64 ga[32];
  for (int i = 0; i < 32; i++) {
    c.s[i] = (u32)a[i];
    ga[i] = g[i] + in.target;
    c.g[i] = ga[i];
    u32 s = in.operand[1] == NO_REGISTER ? (u32)in.vector : source<u32>(w, in.operand[1])[i];
    c.read_bytes[i] = s > (u32)in.vector ? in.vector : s;
    if (c.read_bytes[i]) read |= 1u << i;
  }
  read &= m;
  if (!check_shared(w, in, m, a, in.vector)) return;
  if (read && !check_global(w, in, read, ga, in.vector, false)) return;
  if (read)
    count_sectors(w, read, ga, in.vector, COUNT_LOAD_REQUESTS, COUNT_LOAD_SECTORS, COUNT_LOAD_BYTES, true,
                  false);
  if (launch.race_mode)
    for (u32 q = m; q; q &= q - 1) {
      int i = __builtin_ctz(q);
      u8 b[16] = {0};
      if (c.read_bytes[i]) memcpy(b, (void*)c.g[i], c.read_bytes[i]);
      note_shared_access(w, in, i, c.s[i], c.size, true, b);
    }
  int mode = launch.config->copies;
  if (mode == 0 || (mode == 2 && launch.rng.below(2)))
    land_copy(w, c);
  else
    w.open_copies.push_back(c);
}
static void commit_copies(Warp& w, const Instruction& in, u32 m) {
  if (!m) return;
  w.committed_copies.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}
static void land_copies(Warp& w, size_t keep, bool all) {
  while (w.committed_copies.size() > keep) {
    auto g = std::move(w.committed_copies.front());
    w.committed_copies.erase(w.committed_copies.begin());
    for (auto& c : g) land_copy(w, c);
  }
  if (all) {
    for (auto& c : w.open_copies) land_copy(w, c);
    w.open_copies.clear();
  }
}
static void wait_for_copies(Warp& w, const Instruction& in, u32 m) {
  if (m) land_copies(w, (size_t)in.immediate, in.flag);
}
