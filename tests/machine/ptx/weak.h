// Weak memory: a store buffer and an incoherent first-level cache per program.
#pragma once

static void flush_word(Launch& launch, Program& program, u64 key) {
  auto it = program.store_buffer.find(key);
  if (it == program.store_buffer.end()) return;
  u8* p = (u8*)(key << 3);
  u8 d[8];
  memcpy(d, &it->second.data, 8);
  for (int i = 0; i < 8; i++)
    if ((it->second.mask >> i) & 1) p[i] = d[i];
  // a line of this program's L1 fetched while the store was buffered does not have it yet
  auto l = program.cache.find(key >> 2);
  if (l != program.cache.end())
    for (int i = 0; i < 8; i++)
      if ((it->second.mask >> i) & 1) l->second[((key << 3) & 31) + i] = d[i];
  program.store_buffer.erase(it);
}
static void flush_release(Launch& launch, Program& program, int warp, u32 lanes) {
  std::vector<u64> ks;
  for (auto& e : program.store_buffer)
    if (e.second.epoch < program.epoch || (e.second.warp == warp && ((lanes >> e.second.lane) & 1)))
      ks.push_back(e.first);
  for (u64 k : ks) flush_word(launch, program, k);
}
static void flush_all(Launch& launch) {
  for (Program* program : launch.programs) {
    std::vector<u64> ks;
    for (auto& e : program->store_buffer) ks.push_back(e.first);
    for (u64 k : ks) flush_word(launch, *program, k);
    program->buffered_keys.clear();
  }
}
static void flush_random(Launch& launch) {
  if (launch.programs.empty()) return;
  Program& program = *launch.programs[launch.rng.below((u32)launch.programs.size())];
  while (!program.buffered_keys.empty()) {
    u32 i = launch.rng.below((u32)program.buffered_keys.size());
    u64 k = program.buffered_keys[i];
    program.buffered_keys[i] = program.buffered_keys.back();
    program.buffered_keys.pop_back();
    if (program.store_buffer.count(k)) {
      flush_word(launch, program, k);
      return;
    }
  }
}
static void weak_load(Warp& w, u64 a, u32 n, u8* out, u32 fl) {
  Launch& launch = *w.launch;
  Program& program = *w.program;
  u64 sec = a >> 5;
  if (fl & (ORDER_RELAXED | ORDER_ACQUIRE | ORDER_VOLATILE | CACHE_GLOBAL)) {
    memcpy(out, (void*)a, n);
    if (fl & (ORDER_RELAXED | ORDER_ACQUIRE | ORDER_VOLATILE)) program.cache.erase(sec);
  } else {
    auto it = program.cache.find(sec);
    if (it == program.cache.end() || (int)launch.rng.below(1000) < launch.config->evict) {
      auto& s = program.cache[sec];
      memcpy(s.data(), (void*)(sec << 5), 32);
      it = program.cache.find(sec);
    }
    memcpy(out, it->second.data() + (a & 31), n);
  }
  for (u64 k = a >> 3; k <= (a + n - 1) >> 3; k++) {
    auto it = program.store_buffer.find(k);
    if (it == program.store_buffer.end()) continue;
    u8 d[8];
    memcpy(d, &it->second.data, 8);
    for (int i = 0; i < 8; i++)
      if ((it->second.mask >> i) & 1) {
        u64 x = (k << 3) + i;
        if (x >= a && x < a + n) out[x - a] = d[i];
      }
  }
}
static void weak_store(Warp& w, int lane, u64 a, u32 n, const u8* v, u32 fl) {
  Launch& launch = *w.launch;
  Program& program = *w.program;
  auto l = program.cache.find(a >> 5);
  if (l != program.cache.end()) memcpy(l->second.data() + (a & 31), v, n);
  for (u32 i = 0; i < n;) {
    u64 k = (a + i) >> 3;
    auto it = program.store_buffer.find(k);
    if (it != program.store_buffer.end() &&
        (it->second.warp != w.id || it->second.lane != lane || it->second.epoch != program.epoch)) {
      flush_word(launch, program, k);
      it = program.store_buffer.end();
    }
    if (it == program.store_buffer.end()) {
      it = program.store_buffer.emplace(k, BufferedWord{0, 0, (u16)w.id, (u8)lane, program.epoch}).first;
      program.buffered_keys.push_back(k);
    }
    u8 d[8];
    memcpy(d, &it->second.data, 8);
    for (; i < n && ((a + i) >> 3) == k; i++) {
      d[(a + i) & 7] = v[i];
      it->second.mask |= 1 << ((a + i) & 7);
    }
    memcpy(&it->second.data, d, 8);
  }
  if (fl & ORDER_RELEASE) flush_release(launch, program, w.id, 1u << lane);
}
