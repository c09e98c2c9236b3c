// The state of a launch; where an access may go; sectors of an access.
#pragma once

static thread_local std::string g_error;
struct Launch {
  Config* config;
  Kernel* kernel;
  std::vector<char> parameters;
  std::vector<Program*> programs;  // resident
  std::vector<Warp*> ready;
  u64 program_count = 0, next_program = 0, finished = 0;
  Random rng;
  std::vector<Range> ranges;
  int hot = 0;
  std::vector<std::vector<u64>> read_sectors, written_sectors;
  u64* counters;
  u64* warp_counts;
  u64* thread_counts;
  u64 instructions_run = 0, last_change = 0;
  std::vector<std::string> reports;
  u64 report_count = 0;
  std::map<std::string, int> seen;
  bool slow = false, race_mode = false, weak = false;
  int agents = 0;
  std::vector<u32> clocks;
  std::vector<u32> fence_clocks, pending_clocks;
  std::vector<u8> has_fence, has_pending;
  std::unordered_map<u64, std::vector<u32>> releases;
  std::unordered_map<u64, ShadowByte*> shadow;
  u64 hot_page = ~0ull;
  ShadowByte* hot_shadow = nullptr;
  std::vector<std::vector<u32>> reader_lists;
  bool stop = false;
  int code = 0;
  std::string error;

  u32* clock_of(int a) { return &clocks[(size_t)a * agents]; }
  void fail(int c, const std::string& s) {
    if (!stop) {
      stop = true;
      code = c;
      error = s;
    }
  }
  std::string where(const Warp& w, const Instruction& in) {
    char b[160];
    snprintf(b, sizeof b, " [kernel %s, program (%d,%d,%d), warp %d, PTX line %d: ", kernel->name.c_str(),
             w.program->x, w.program->y, w.program->z, w.id, in.line);
    std::string s = b;
    s += in.line < (int)kernel->text.size() ? kernel->text[in.line] : "?";
    s += "; ";
    s += in.source_line >= 0 ? kernel->source_lines[in.source_line] : "?";
    return s + "]";
  }
  void report(const char* what, const Warp& w, const Instruction& in, const std::string& detail) {
    report_count++;
    std::string key = std::string(what) + ":" + std::to_string(in.line);
    if (seen[key]++) return;
    if ((int)reports.size() < config->max_reports)
      reports.push_back(std::string(what) + ": " + detail + where(w, in));
  }
  Range* find(u64 a, u64 n) {
    if (ranges.size() && a >= ranges[hot].lo && a + n <= ranges[hot].hi) return &ranges[hot];
    size_t lo = 0, hi = ranges.size();
    while (lo < hi) {
      size_t mid = (lo + hi) / 2;
      if (ranges[mid].lo <= a)
        lo = mid + 1;
      else
        hi = mid;
    }
    if (lo && a + n <= ranges[lo - 1].hi) {
      hot = (int)lo - 1;
      return &ranges[hot];
    }
    return nullptr;
  }
  bool learn(u64 a, u64 n) {
    if (!config->find_storage) return false;
    typedef int (*CB)(u64, u64*, u64*);
    u64 lo = 0, hi = 0;
    if (!((CB)config->find_storage)(a, &lo, &hi) || a < lo || a + n > hi) return false;
    Range r{lo, hi, (int)read_sectors.size(), 1};
    size_t i = 0;
    while (i < ranges.size() && ranges[i].lo < lo) i++;
    ranges.insert(ranges.begin() + i, r);
    hot = (int)i;
    read_sectors.emplace_back((hi - (lo & ~31ull)) / 32 / 64 + 2);
    written_sectors.emplace_back((hi - (lo & ~31ull)) / 32 / 64 + 2);
    return true;
  }
};

static ALWAYS_INLINE void addresses(Warp& w, const Instruction& in, u64* a) {
  if (in.base == NO_REGISTER) {
    for (int i = 0; i < 32; i++) a[i] = in.immediate;
    return;
  }
  if (in.source_bytes == 8) {
    const u64* b = source<u64>(w, in.base);
    for (int i = 0; i < 32; i++) a[i] = b[i] + in.immediate;
  } else {
    const u32* b = source<u32>(w, in.base);
    for (int i = 0; i < 32; i++) a[i] = (u64)(u32)(b[i] + (u32)in.immediate);
  }
}

// bounds and alignment of a global access; false: launch stopped
static bool check_global(Warp& w, const Instruction& in, u32 m, const u64* a, u32 n, bool write) {
  Launch& launch = *w.launch;
  u64 mn = ~0ull, mx = 0, al = 0;
  for (int i = 0; i < 32; i++) {
    bool on = (m >> i) & 1;
    u64 x = on ? a[i] : ~0ull, y = on ? a[i] : 0;
    mn = x < mn ? x : mn;
    mx = y > mx ? y : mx;
    al |= y;
  }
  if (al & (n - 1)) {
    launch.report("misaligned", w, in, "access of " + std::to_string(n) + " bytes");
    launch.fail(3, "misaligned global access" + launch.where(w, in));
    return false;
  }
  Range* r = launch.find(mn, mx - mn + n);
  if (r) return true;
  if (!launch.config->bounds) return true;
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      if (!launch.find(a[i], n) && !launch.learn(a[i], n)) {
        char b[200];
        u64 best = ~0ull;
        Range* nr = nullptr;
        for (auto& q : launch.ranges) {
          u64 d = a[i] < q.lo ? q.lo - a[i] : a[i] + n - q.hi;
          if (d < best) best = d, nr = &q;
        }
        snprintf(b, sizeof b,
                 "%s of %u bytes at %#llx by lane %d: outside every known storage; %llu bytes %s range %d of "
                 "%llu bytes",
                 write ? "write" : "read", n, (unsigned long long)a[i], i, (unsigned long long)best,
                 nr && a[i] < nr->lo ? "before" : "past the end of", nr ? nr->id : -1,
                 nr ? (unsigned long long)(nr->hi - nr->lo) : 0ull);
        launch.report("bounds", w, in, b);
        launch.fail(2, std::string("bounds: ") + b + launch.where(w, in));
        return false;
      }
    }
  return true;
}
static void count_sectors(Warp& w, u32 m, const u64* a, u32 n, int which_req, int which_sect, int which_bytes,
                          bool rd, bool wr) {
  Launch& launch = *w.launch;
  if (!launch.config->count) return;
  launch.counters[which_req]++;
  if (which_bytes >= 0) launch.counters[which_bytes] += (u64)n * __builtin_popcount(m);
  u64 s[64];
  int k = 0;
  u64 last = ~0ull;
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      u64 lo = a[i] >> 5, hi = (a[i] + n - 1) >> 5;
      for (u64 q = lo; q <= hi; q++)
        if (q != last) {
          if (k < 64) s[k++] = q;
          last = q;
        }
    }
  bool sorted = true;
  for (int i = 1; i < k; i++)
    if (s[i] <= s[i - 1]) {
      sorted = false;
      break;
    }
  if (!sorted) {
    std::sort(s, s + k);
    k = (int)(std::unique(s, s + k) - s);
  }
  launch.counters[which_sect] += k;
  if (!k) return;
  Range* r = nullptr;
  std::vector<u64>*br = nullptr, *bw = nullptr;
  u64 base = 0;
  for (int i = 0; i < k; i++) {
    u64 ad = s[i] << 5;
    if (!r || ad + 31 < r->lo || ad >= r->hi) {
      // A sector may straddle the start of a storage: look for one that holds any of its bytes.
      r = launch.find(ad < 32 ? ad : ad, 1);
      if (!r) r = launch.find(ad + 31, 1);
      if (!r) {
        for (auto& q : launch.ranges)
          if (q.lo < ad + 32 && q.hi > ad) {
            r = &q;
            break;
          }
      }
      if (!r) continue;
      br = &launch.read_sectors[r->id];
      bw = &launch.written_sectors[r->id];
      base = r->lo >> 5;
    }
    u64 x = s[i] - base;
    if (x / 64 >= br->size()) continue;
    if (rd) (*br)[x >> 6] |= 1ull << (x & 63);
    if (wr) (*bw)[x >> 6] |= 1ull << (x & 63);
  }
}
