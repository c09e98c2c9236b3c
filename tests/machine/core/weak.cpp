#include "weak.h"
#include "races.h"

namespace machine {

// Keys of the buffer are addresses / 8, of lines of L1 addresses / 32.
template <class F> static void each_masked(const BufferedWord& word, F f) {
  u8 data[8];
  memcpy(data, &word.data, 8);
  for (int i = 0; i < 8; i++) {
    if (word.mask >> i & 1) f(i, data[i]);
  }
}

static void flush(Program& program, u64 key) {
  auto found = program.buffer.find(key);
  if (found == program.buffer.end()) return;
  auto line = program.l1.find(key >> 2);  // it may have been fetched while the store was buffered
  each_masked(found->second, [&](int i, u8 byte) {
    *((u8*)(key << 3) + i) = byte;
    if (line != program.l1.end()) line->second[(key << 3 & 31) + i] = byte;
  });
  program.buffer.erase(found);
}

void release_stores(Warp& warp, u32 lanes) {
  Program& program = *warp.program;
  std::vector<u64> ordered;
  for (auto& [key, word] : program.buffer) {
    bool own = word.warp == warp.index && lanes >> word.lane & 1;
    if (own || word.epoch < program.epoch) ordered.push_back(key);
  }
  for (u64 key : ordered) flush(program, key);
}

void forget_lines(Warp& warp) { warp.program->l1.clear(); }

void meet_memory(Warp& warp, u64 address, u32 bytes) {
  for (u64 key = address >> 3; key <= (address + bytes - 1) >> 3; key++) flush(*warp.program, key);
  warp.program->l1.erase(address >> 5);
}

void flush_one(Launch& launch) {
  if (launch.programs.empty()) return;
  Program& program = *launch.programs[launch.random.below((u32)launch.programs.size())];
  std::vector<u64>& keys = program.buffered;
  while (!keys.empty()) {
    std::swap(keys[launch.random.below((u32)keys.size())], keys.back());
    u64 key = keys.back();
    keys.pop_back();
    if (program.buffer.count(key)) return flush(program, key);
  }
}

void flush_all(Launch& launch) {
  for (auto& program : launch.programs) {
    for (u64 key : program->buffered) flush(*program, key);
    program->buffered.clear();
  }
}

void weak_load(Warp& warp, u64 address, u32 bytes, u8* to, u8 order) {
  Launch& launch = *warp.launch;
  Program& program = *warp.program;
  u64 sector = address >> 5;
  bool strong = order & (RELAXED | ACQUIRE | VOLATILE);
  if (strong || (order & PAST_L1)) {
    memcpy(to, (const void*)address, bytes);
    if (strong) program.l1.erase(sector);
  } else {
    auto [line, is_new] = program.l1.try_emplace(sector);
    if (is_new || launch.random.chance(launch.request.evict))
      memcpy(line->second.data(), (const void*)(sector << 5), 32);
    memcpy(to, line->second.data() + (address & 31), bytes);
  }
  for (u64 key = address >> 3; key <= (address + bytes - 1) >> 3; key++) {
    auto word = program.buffer.find(key);
    if (word == program.buffer.end()) continue;
    each_masked(word->second, [&](int i, u8 byte) {
      u64 offset = (key << 3) + i - address;
      if (offset < bytes) to[offset] = byte;
    });
  }
}

// A word holds the stores of one lane between two barriers: a store by another flushes it first.
static BufferedWord& word_for(Warp& warp, int lane, u64 key) {
  Program& program = *warp.program;
  auto found = program.buffer.find(key);
  if (found != program.buffer.end()) {
    BufferedWord& word = found->second;
    if (word.warp == warp.index && word.lane == lane && word.epoch == program.epoch) return word;
    flush(program, key);
  }
  program.buffered.push_back(key);
  return program.buffer[key] = BufferedWord{0, 0, (u8)lane, (u16)warp.index, program.epoch};
}

void weak_store(Warp& warp, int lane, u64 address, u32 bytes, const u8* from, u8 order) {
  if (order & RELEASE) release_stores(warp, 1u << lane);
  auto line = warp.program->l1.find(address >> 5);
  if (line != warp.program->l1.end()) memcpy(line->second.data() + (address & 31), from, bytes);
  for (u32 i = 0; i < bytes;) {
    u64 key = (address + i) >> 3;
    BufferedWord& word = word_for(warp, lane, key);
    for (; i < bytes && (address + i) >> 3 == key; i++) {
      int byte = (address + i) & 7;
      memcpy((u8*)&word.data + byte, from + i, 1);
      word.mask |= 1 << byte;
    }
  }
  if (order & RELEASE) release_stores(warp, 1u << lane);
}

}  // namespace machine
