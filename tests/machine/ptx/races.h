// Races by happens-before. An agent is a warp; what orders two of them is a barrier, a fence, or a release that
// an acquire saw.
#pragma once

static ShadowByte* shadow_page(Launch& launch, u64 page) {
  if (page == launch.hot_page) return launch.hot_shadow;
  ShadowByte*& p = launch.shadow[page];
  if (!p) p = (ShadowByte*)calloc(4096, sizeof(ShadowByte));
  launch.hot_page = page;
  launch.hot_shadow = p;
  return p;
}
static std::string agent_name(Launch& launch, Warp& w, u32 ag) {
  int nw = (int)w.program->warps.size();
  char b[64];
  snprintf(b, sizeof b, "program %u warp %u", ag / nw, ag % nw);
  return b;
}
static void race(Warp& w, const Instruction& in, const char* kind, bool shared, u64 addr, u32 other,
                 s32 oline) {
  Launch& launch = *w.launch;
  launch.counters[COUNT_RACES]++;
  char b[256];
  snprintf(b, sizeof b, "%s on %s byte %#llx with %s at PTX line %d (%s)", kind, shared ? "shared" : "global",
           (unsigned long long)addr, agent_name(launch, w, other).c_str(), oline,
           oline > 0 && oline < (int)launch.kernel->text.size() ? launch.kernel->text[oline].c_str() : "?");
  int nw = (int)w.program->warps.size();
  bool within = !shared && other / nw == (u32)w.agent / nw;
  launch.report(shared ? "race.shared" : within ? "race.within" : "race.global", w, in, b);
  if (within) launch.counters[COUNT_RACES_WITHIN]++;
}
static void benign(Warp& w, const Instruction& in, bool shared, u64 addr, u32 other, s32 oline) {
  Launch& launch = *w.launch;
  launch.counters[COUNT_BENIGN]++;
  if (!(launch.config->detail & 1)) return;
  char b[200];
  snprintf(b, sizeof b, "%s: the value that is there, unordered with %s at PTX line %d",
           shared ? "shared" : "global", agent_name(launch, w, other).c_str(), oline);
  launch.report("benign", w, in, b);
}
static void intra(Warp& w, const Instruction& in, const char* kind, bool shared, u64 addr, int lane, int other,
                  s32 oline) {
  Launch& launch = *w.launch;
  launch.counters[COUNT_INTRA_WARP]++;
  if (!(launch.config->detail & 2)) return;
  char b[256];
  snprintf(b, sizeof b,
           "%s, %s byte %#llx: lane %d after lane %d at PTX line %d (%s), no bar.warp.sync between", kind,
           shared ? "shared" : "global", (unsigned long long)addr, lane, other, oline,
           oline > 0 && oline < (int)launch.kernel->text.size() ? launch.kernel->text[oline].c_str() : "?");
  launch.report("intra_warp", w, in, b);
}
static ALWAYS_INLINE void note_read(Warp& w, const Instruction& in, ShadowByte& s, bool strong, bool shared,
                                    u64 addr, int lane) {
  Launch& launch = *w.launch;
  u32 ag = w.agent;
  u32* C = launch.clock_of(ag);
  if (s.writer) {
    if (s.writer - 1 != ag) {
      if (!(s.write_strong && strong) && s.write_time > C[s.writer - 1]) {
        if (s.write_silent)
          benign(w, in, shared, addr, s.writer - 1, s.write_line);
        else
          race(w, in, "read after unordered write", shared, addr, s.writer - 1, s.write_line);
      }
    } else if (s.write_lane != lane && s.write_time == C[ag] && s.write_syncs == w.warp_syncs &&
               !(s.write_strong && strong))
      intra(w, in, "read after write", shared, addr, lane, s.write_lane, s.write_line);
  }
  if (s.reader != 0xffffffffu && (!s.reader || s.reader - 1 == ag || s.read_time <= C[s.reader - 1])) {
    bool again = s.reader - 1 == ag && s.read_time == C[ag] && s.read_syncs == w.warp_syncs &&
                 s.read_lane != lane;  // several lanes: 255
    s.reader = ag + 1;
    s.read_time = C[ag];
    s.read_strong = strong;
    s.read_line = in.line;
    s.read_lane = again ? 255 : (u8)lane;
    s.read_syncs = w.warp_syncs;
    return;
  }
  if (s.reader != 0xffffffffu) {
    s.readers = (s32)launch.reader_lists.size();
    launch.reader_lists.push_back({s.reader - 1, s.read_time, s.read_strong, (u32)s.read_line});
    s.reader = 0xffffffffu;
  }
  auto& v = launch.reader_lists[s.readers];
  for (size_t i = 0; i < v.size(); i += 4)
    if (v[i] == ag) {
      v[i + 1] = C[ag];
      v[i + 2] = strong;
      v[i + 3] = in.line;
      return;
    }
  v.push_back(ag);
  v.push_back(C[ag]);
  v.push_back(strong);
  v.push_back(in.line);
}
static ALWAYS_INLINE void note_write(Warp& w, const Instruction& in, ShadowByte& s, bool strong, bool shared,
                                     u64 addr, u8 oldv, u8 newv, int lane, bool rmw = false) {
  Launch& launch = *w.launch;
  u32 ag = w.agent;
  u32* C = launch.clock_of(ag);
  bool same = oldv == newv && !rmw;
  if (s.writer) {
    if (s.writer - 1 != ag) {
      if (!(s.write_strong && strong) && s.write_time > C[s.writer - 1]) {
        if (same)
          benign(w, in, shared, addr, s.writer - 1, s.write_line);
        else
          race(w, in, "write after unordered write", shared, addr, s.writer - 1, s.write_line);
      }
    } else if (s.write_lane != lane && s.write_time == C[ag] && s.write_syncs == w.warp_syncs &&
               !(s.write_strong && strong)) {
      if (s.write_instruction == (u32)launch.instructions_run) {
        if (!same)
          race(w, in, "lanes of one instruction write different values", shared, addr, ag, s.write_line);
      } else if (!same)
        intra(w, in, "write after write", shared, addr, lane, s.write_lane, s.write_line);
    }
  }
  if (s.reader == 0xffffffffu) {
    auto& v = launch.reader_lists[s.readers];
    for (size_t i = 0; i < v.size(); i += 4)
      if (v[i] != ag && v[i + 1] > C[v[i]] && !(strong && v[i + 2])) {
        if (same)
          benign(w, in, shared, addr, v[i], v[i + 3]);
        else
          race(w, in, "write after unordered read", shared, addr, v[i], v[i + 3]);
        break;
      }
  } else if (s.reader) {
    if (s.reader - 1 != ag) {
      if (s.read_time > C[s.reader - 1] && !(strong && s.read_strong)) {
        if (same)
          benign(w, in, shared, addr, s.reader - 1, s.read_line);
        else
          race(w, in, "write after unordered read", shared, addr, s.reader - 1, s.read_line);
      }
    } else if (s.read_lane != lane && s.read_time == C[ag] && s.read_syncs == w.warp_syncs && !same &&
               !(strong && s.read_strong))
      intra(w, in, "write after read", shared, addr, lane, s.read_lane, s.read_line);
  }
  s.write_silent = same && s.writer;
  s.writer = ag + 1;
  s.write_time = C[ag];
  s.write_strong = strong;
  s.write_line = in.line;
  s.reader = 0;
  s.write_lane = (u8)lane;
  s.write_syncs = w.warp_syncs;
  s.write_instruction = (u32)launch.instructions_run;
}
static ALWAYS_INLINE void join_clocks(u32* a, const u32* b, int n) {
  for (int i = 0; i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}
static void acquire_clock(Warp& w, u64 key, bool acq) {
  Launch& launch = *w.launch;
  auto it = launch.releases.find(key);
  if (it == launch.releases.end()) return;
  if (acq)
    join_clocks(launch.clock_of(w.agent), it->second.data(), launch.agents);
  else {
    join_clocks(&launch.pending_clocks[(size_t)w.agent * launch.agents], it->second.data(), launch.agents);
    launch.has_pending[w.agent] = 1;
  }
}
static void release_clock(Warp& w, u64 key, bool rel, bool rmw) {
  Launch& launch = *w.launch;
  int ag = w.agent;
  if (!rmw) launch.releases.erase(key);
  if (rel) {
    auto& v = launch.releases[key];
    if (v.empty()) v.assign(launch.agents, 0);
    join_clocks(v.data(), launch.clock_of(ag), launch.agents);
    launch.clock_of(ag)[ag]++;
  } else if (launch.has_fence[ag]) {
    auto& v = launch.releases[key];
    if (v.empty()) v.assign(launch.agents, 0);
    join_clocks(v.data(), &launch.fence_clocks[(size_t)ag * launch.agents], launch.agents);
  }
}
static void fence_clock(Warp& w) {
  Launch& launch = *w.launch;
  int ag = w.agent;
  if (launch.has_pending[ag]) {
    join_clocks(launch.clock_of(ag), &launch.pending_clocks[(size_t)ag * launch.agents], launch.agents);
  }
  memcpy(&launch.fence_clocks[(size_t)ag * launch.agents], launch.clock_of(ag), 4 * launch.agents);
  launch.has_fence[ag] = 1;
  launch.clock_of(ag)[ag]++;
}
