#include "races.h"
#include <algorithm>

namespace machine {

constexpr u32 MANY = ~0u;
constexpr u8 SEVERAL_LANES = 255;
constexpr u64 PAGE = 4096;
constexpr size_t MOST_PAGES = ((size_t)1 << 30) / (PAGE * sizeof(ByteHistory));

// --- clocks ----------------------------------------------------------------------------------------------------------

static Knowledge merged(const Knowledge& a, const Knowledge& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto all = std::make_shared<std::vector<Known>>();
  all->reserve(std::max(a->size(), b->size()));
  auto x = a->begin(), y = b->begin();
  bool only_a = true;
  while (x != a->end() || y != b->end()) {
    if (y == b->end() || (x != a->end() && x->agent < y->agent)) { all->push_back(*x++); continue; }
    if (x == a->end() || y->agent < x->agent) { all->push_back(*y++); only_a = false; continue; }
    only_a &= y->time <= x->time;
    all->push_back({x->agent, std::max(x->time, y->time)});
    ++x, ++y;
  }
  return only_a ? a : all;
}

static std::vector<Known>::const_iterator first_from(const Knowledge& knowledge, u32 agent) {
  return std::lower_bound(knowledge->begin(), knowledge->end(), agent,
                          [](const Known& known, u32 a) { return known.agent < a; });
}

u32 Races::known_time(const Access& access, u32 other) {
  const Agent& self = access.self;
  u32 inside = other - (access.warp.agent - access.warp.index);
  if (inside < warps) return self.inside[inside];
  if (!self.outside) return 0;
  auto found = first_from(self.outside, other);
  return found != self.outside->end() && found->agent == other ? found->time : 0;
}

Knowledge Races::all_known(const Warp& warp) {
  Agent& self = agent(warp);
  auto own = std::make_shared<std::vector<Known>>();
  for (u32 i = 0; i < warps; i++) {
    if (self.inside[i]) own->push_back({(u32)warp.program->id * warps + i, self.inside[i]});
  }
  return merged(own, self.outside);
}

// What came from elsewhere may tell of the program's own warps, too.
void Races::learn(const Warp& warp, const Knowledge& knowledge) {
  if (!knowledge) return;
  Agent& self = agent(warp);
  u32 first = (u32)warp.program->id * warps;
  for (auto known = first_from(knowledge, first); known != knowledge->end() && known->agent < first + warps; ++known) {
    self.inside[known->agent - first] = std::max(self.inside[known->agent - first], known->time);
  }
  self.outside = merged(self.outside, knowledge);
}

void Races::acquire(const Warp& warp, u64 address, bool at_once) {
  auto found = released.find(address);
  if (found == released.end()) return;
  if (at_once) learn(warp, found->second); else agent(warp).pending = merged(agent(warp).pending, found->second);
}

void Races::release(const Warp& warp, u64 address, bool releases, bool read_modify_write) {
  Agent& self = agent(warp);
  if (!read_modify_write) released.erase(address);
  if (releases) {
    Knowledge& knowledge = released[address];
    knowledge = merged(knowledge, all_known(warp));
    self.inside[warp.index]++;
  } else if (self.at_fence) {
    Knowledge& knowledge = released[address];
    knowledge = merged(knowledge, self.at_fence);
  }
}

void Races::fence(Warp& warp) {
  Agent& self = agent(warp);
  learn(warp, self.pending);
  self.at_fence = all_known(warp);
  self.inside[warp.index]++;
}

void Races::barrier(Program& program, const std::vector<int>& arrived) {
  std::vector<Agent>& all = agents[program.id];
  std::vector<u32> times(warps, 0);
  Knowledge outside;
  for (int i : arrived) {
    for (u32 w = 0; w < warps; w++) times[w] = std::max(times[w], all[i].inside[w]);
    outside = merged(outside, all[i].outside);
  }
  for (int i : arrived) {
    all[i].inside = times;
    all[i].inside[i]++;
    all[i].outside = outside;
  }
}

// --- programs and pages ----------------------------------------------------------------------------------------------

Races::Races(Launch& launch) : launch(launch), warps((u32)launch.warps_per_program), agents(launch.program_count) {}

Races::~Races() {
  for (auto& page : pages) free(page.second);
}

void Races::start(const Program& program) {
  agents[program.id].resize(warps);
  for (u32 i = 0; i < warps; i++) {
    agents[program.id][i].inside.assign(warps, 0);
    agents[program.id][i].inside[i] = 1;
  }
}

void Races::end(const Program& program) { agents[program.id] = {}; }

ByteHistory* Races::global_history(u64 address) {
  u64 page = address / PAGE;
  if (page != hot_page) {
    auto found = pages.find(page);
    if (found == pages.end()) {
      if (pages.size() >= MOST_PAGES) return nullptr;
      found = pages.emplace(page, (ByteHistory*)calloc(PAGE, sizeof(ByteHistory))).first;
    }
    hot_page = page;
    hot_histories = found->second;
  }
  return hot_histories + address % PAGE;
}

// --- what is said of a race ------------------------------------------------------------------------------------------

std::string Races::other_place(u32 other, s32 index) {
  const Instruction& in = launch.kernel.code[index];
  return text("program %u warp %u at %s (PTX line %d: %s)", other / warps, other % warps, launch.source(in).c_str(),
              in.line, launch.kernel.text_of(in).c_str());
}

void Races::conflict(const Access& access, u64 address, const char* what, u32 other, s32 other_index, bool benign) {
  bool within = !access.shared && other / warps == (u32)access.warp.program->id;
  const char* memory = access.shared ? "shared" : "global";
  const char* kind = benign ? "benign" : access.shared ? "race.shared" : within ? "race.within" : "race.global";
  launch.count(benign ? Counter::benign : Counter::races);
  if (!benign && within) launch.count(Counter::races_within);
  if ((benign && !launch.request.detail) || !launch.is_new(kind, access.in, other_index)) return;
  std::string told = text("%s of %s byte %#llx by ", what, memory, (unsigned long long)address);
  told += other_place(other, other_index);
  launch.report(kind, access.warp, access.in, told + (benign ? ", the value that is there," : ""), other_index);
}

void Races::within_warp(const Access& access, u64 address, const char* what, int other_lane, s32 other_index) {
  launch.count(Counter::intra_warp);
  if (!launch.request.detail || !launch.is_new("intra_warp", access.in, other_index)) return;
  std::string told = text("lane %d, %s of %s byte %#llx by lane %d without bar.warp.sync between, at ", access.lane,
                          what, access.shared ? "shared" : "global", (unsigned long long)address, other_lane);
  launch.report("intra_warp", access.warp, access.in, told + other_place(access.warp.agent, other_index), other_index);
}

// --- accesses --------------------------------------------------------------------------------------------------------

inline void Races::read(const Access& access, u64 address, ByteHistory& history) {
  Warp& warp = access.warp;
  u32 now = access.now;
  if (history.writer && !(history.write_strong && access.strong)) {
    u32 writer = history.writer - 1;
    if (writer != warp.agent) {
      if (history.write_time > known_time(access, writer)) {
        conflict(access, address, "read after an unordered write", writer, history.write_index, history.write_silent);
      }
    } else if (history.write_lane != access.lane && history.write_time == now &&
               history.write_warp_barriers == warp.warp_barriers) {
      within_warp(access, address, "read after a write", history.write_lane, history.write_index);
    }
  }
  u32 reader = history.reader;
  if (reader == MANY || (reader && reader - 1 != warp.agent && history.read_time > known_time(access, reader - 1))) {
    return add_reader(access, history);
  }
  bool again = reader == warp.agent + 1 && history.read_time == now &&
               history.read_warp_barriers == warp.warp_barriers && history.read_lane != access.lane;
  history.reader = warp.agent + 1;
  history.read_time = now;
  history.read_strong = access.strong;
  history.read_index = access.in.index;
  history.read_lane = again ? SEVERAL_LANES : (u8)access.lane;
  history.read_warp_barriers = warp.warp_barriers;
}

void Races::add_reader(const Access& access, ByteHistory& history) {
  if (history.reader != MANY) {
    if (unused_readers.empty()) {
      unused_readers.push_back((u32)readers.size());
      readers.emplace_back();
    }
    history.many = unused_readers.back();
    unused_readers.pop_back();
    readers[history.many].push_back(
        {history.reader - 1, history.read_time, history.read_index, (bool)history.read_strong});
    history.reader = MANY;
  }
  std::vector<Reader>& all = readers[history.many];
  Reader reader{access.warp.agent, access.now, access.in.index, access.strong};
  for (Reader& known : all) {
    if (known.agent != reader.agent) continue;
    known = reader;
    return;
  }
  all.push_back(reader);
}

inline void Races::check_written(const Access& access, u64 address, const ByteHistory& history, bool same) {
  if (!history.writer || (history.write_strong && access.strong)) return;
  Warp& warp = access.warp;
  u32 writer = history.writer - 1;
  if (writer != warp.agent) {
    if (history.write_time > known_time(access, writer)) {
      conflict(access, address, "write after an unordered write", writer, history.write_index, same);
    }
    return;
  }
  bool ordered =
      history.write_time != access.now || history.write_warp_barriers != warp.warp_barriers;
  if (ordered || same || history.write_lane == access.lane) return;
  if (history.write_moment == (u32)launch.moment) {
    conflict(access, address, "another value, written by another lane of the same instruction: write", writer,
             history.write_index, false);
  } else {
    within_warp(access, address, "write after a write", history.write_lane, history.write_index);
  }
}

inline void Races::check_readers(const Access& access, u64 address, const ByteHistory& history, bool same) {
  Warp& warp = access.warp;
  if (history.reader == MANY) {
    for (const Reader& reader : readers[history.many]) {
      if (reader.agent == warp.agent || (reader.strong && access.strong) ||
          reader.time <= known_time(access, reader.agent))
        continue;
      return conflict(access, address, "write after an unordered read", reader.agent, reader.index, same);
    }
    return;
  }
  if (!history.reader || (history.read_strong && access.strong)) return;
  u32 reader = history.reader - 1;
  if (reader != warp.agent) {
    if (history.read_time > known_time(access, reader)) {
      conflict(access, address, "write after an unordered read", reader, history.read_index, same);
    }
  } else if (history.read_lane != access.lane && history.read_time == access.now &&
             history.read_warp_barriers == warp.warp_barriers && !same) {
    within_warp(access, address, "write after a read", history.read_lane, history.read_index);
  }
}

inline void Races::write(const Access& access, u64 address, ByteHistory& history, bool same) {
  Warp& warp = access.warp;
  check_written(access, address, history, same);
  check_readers(access, address, history, same);
  if (history.reader == MANY) {
    readers[history.many].clear();
    unused_readers.push_back(history.many);
  }
  history.write_silent = same && history.writer;
  history.writer = warp.agent + 1;
  history.write_time = access.now;
  history.write_strong = access.strong;
  history.write_index = access.in.index;
  history.write_lane = (u8)access.lane;
  history.write_warp_barriers = warp.warp_barriers;
  history.write_moment = (u32)launch.moment;
  history.reader = 0;
}

void Races::global_read(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes) {
  bool strong = in.order & (RELAXED | ACQUIRE | VOLATILE);
  if (strong) acquire(warp, address, in.order & ACQUIRE);
  Access access = this->access(warp, in, lane, strong, false);
  for (u32 i = 0; i < bytes; i++) {
    ByteHistory* history = global_history(address + i);
    if (!history) return launch.count(Counter::races_unchecked);
    read(access, address + i, *history);
  }
}

void Races::global_write(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* old,
                         const u8* now) {
  bool strong = in.order & (RELAXED | RELEASE | VOLATILE);
  Access access = this->access(warp, in, lane, strong, false);
  for (u32 i = 0; i < bytes; i++) {
    ByteHistory* history = global_history(address + i);
    if (history) write(access, address + i, *history, old[i] == now[i]);
    else launch.count(Counter::races_unchecked, i == 0);
  }
  if (strong || !released.empty()) release(warp, address, in.order & RELEASE, false);
}

void Races::global_atomic(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, bool changes) {
  acquire(warp, address, in.order & ACQUIRE);
  Access access = this->access(warp, in, lane, true, false);
  for (u32 i = 0; i < bytes; i++) {
    ByteHistory* history = global_history(address + i);
    if (!history) { launch.count(Counter::races_unchecked, i == 0); continue; }
    read(access, address + i, *history);
    if (changes) write(access, address + i, *history, false);
  }
  release(warp, address, in.order & RELEASE, true);
}

void Races::shared_read(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes) {
  Access access = this->access(warp, in, lane, false, true);
  for (u32 i = 0; i < bytes; i++) read(access, address + i, warp.program->history[address + i]);
}

void Races::shared_write(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* old,
                         const u8* now) {
  Access access = this->access(warp, in, lane, false, true);
  for (u32 i = 0; i < bytes; i++) write(access, address + i, warp.program->history[address + i], old[i] == now[i]);
}

void Races::shared_atomic(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes) {
  Access access = this->access(warp, in, lane, true, true);
  for (u32 i = 0; i < bytes; i++) {
    read(access, address + i, warp.program->history[address + i]);
    write(access, address + i, warp.program->history[address + i], false);
  }
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

u64 Races::digest(const Program& program, const MatrixRead& read) {
  u64 digest = 0xcbf29ce484222325ull;
  for (u32 address : read.addresses) {
    for (u32 i = 0; i < read.bytes; i++) digest = (digest ^ (u8)program.shared[address + i]) * 0x100000001b3ull;
  }
  return digest;
}

// Read now; what ordinary stores wrote must have passed fence.proxy.async, in the warp that wrote or in this one.
void Races::matrix_read(Warp& warp, MatrixRead read) {
  Program& program = *warp.program;
  for (u32 address : read.addresses) {
    const ByteHistory& history = program.history[address];
    u32 written = history.write_moment;
    bool fenced = !history.writer || warp.proxy_fence >= written ||
                  program.warps[(history.writer - 1) % warps].proxy_fence >= written;
    if (!fenced) {
      launch.count(Counter::races);
      std::string told = text("shared byte %u without fence.proxy.async since its write by ", address);
      told += other_place(history.writer - 1, history.write_index);
      launch.report("race.proxy", warp, *read.in, told, history.write_index);
    }
    shared_read(warp, *read.in, 0, address, read.bytes);
  }
  read.digest = digest(program, read);
  warp.matrix_reads.open.push_back(std::move(read));
}

// The read lasts until here: writes by other warps since its issue race with it, and so do those of its own.
void Races::matrix_done(Warp& warp, const MatrixRead& read) {
  for (u32 address : read.addresses) shared_read(warp, *read.in, 0, address, read.bytes);
  if (digest(*warp.program, read) == read.digest) return;
  launch.count(Counter::races);
  launch.report("race.shared", warp, *read.in, "operands in shared memory changed between a wgmma and its wait");
}

}  // namespace machine
