// The machine as a library: parse a kernel, launch it, ask what happened. Bound by ../core.py.
#include "lanes.h"
#include "launch.h"
#include "races.h"
#include "weak.h"
#include "memory.h"
#include "shared.h"
#include "async_copy.h"
#include "atomics.h"
#include "arithmetic.h"
#include "convert.h"
#include "warp_wide.h"
#include "matrix.h"
#include "parse.h"
#include "decode.h"
#include "allocate.h"
#include "schedule.h"

extern "C" {
void* machine_parse(const char* text, char* err, int n) {
  try {
    return parse_ptx(text);
  } catch (std::exception& e) {
    snprintf(err, n, "%s", e.what());
    return nullptr;
  }
}
int machine_info(void* k, int what, int i) {
  Kernel* K = (Kernel*)k;
  switch (what) {
    case 0: return (int)K->parameters.size();
    case 1: return K->parameter_bytes;
    case 2: return K->parameters[i].off;
    case 3: return K->parameters[i].size;
    case 4: return K->parameters[i].ptr;
    case 5: return K->threads[i];
    case 6: return (int)K->code.size();
    case 7: return (int)K->register_file_bytes;
    case 8: return K->static_shared;
    case 9: return K->code[i].line;
    case 10: return K->code[i].op_class;
    case 11: return K->code[i].source_line;
  }
  return 0;
}
const char* machine_opcodes(void* k) {
  static thread_local std::string s;
  s.clear();
  for (auto& e : ((Kernel*)k)->opcodes) s += e.first + " " + std::to_string(e.second) + "\n";
  return s.c_str();
}
const char* machine_source(void* k, int i) {
  Kernel* K = (Kernel*)k;
  return i >= 0 && i < (int)K->source_lines.size() ? K->source_lines[i].c_str() : "";
}
const char* machine_error() { return g_error.c_str(); }
static thread_local std::string g_reports;
const char* machine_reports() { return g_reports.c_str(); }
int machine_config_size() { return sizeof(Config); }
int machine_counter_count() { return COUNT_TOTAL; }
int machine_launch(void* k, Config* config) {
  Launch launch;
  launch.config = config;
  launch.kernel = (Kernel*)k;
  launch.parameters.assign((char*)config->parameters, (char*)config->parameters + config->parameter_bytes);
  launch.parameters.resize(config->parameter_bytes + 64);
  launch.rng.s = config->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (int i = 0; i < 4; i++) launch.rng.next();
  launch.counters = (u64*)config->counters;
  memset(launch.counters, 0, 8 * (COUNT_TOTAL + 1));
  std::vector<u64> ic(2 * launch.kernel->code.size(), 0);
  launch.warp_counts = config->instruction_counts ? (u64*)config->instruction_counts : ic.data();
  launch.thread_counts = launch.warp_counts + launch.kernel->code.size();
  memset(launch.warp_counts, 0, 16 * launch.kernel->code.size());
  u64* r = (u64*)config->ranges;
  for (int i = 0; i < config->range_count; i++) launch.ranges.push_back({r[2 * i], r[2 * i + 1], i, 1});
  for (auto& g : launch.kernel->globals)
    launch.ranges.push_back({(u64)g.first, (u64)g.first + g.second, (int)launch.ranges.size(), 0});
  std::sort(launch.ranges.begin(), launch.ranges.end(),
            [](const Range& a, const Range& b) { return a.lo < b.lo; });
  for (size_t i = 0; i < launch.ranges.size(); i++) {
    launch.ranges[i].id = (int)i;
    u64 w = (launch.ranges[i].hi - (launch.ranges[i].lo & ~31ull)) / 32 / 64 + 2;
    launch.read_sectors.emplace_back(w);
    launch.written_sectors.emplace_back(w);
  }
  launch.race_mode = config->races;
  launch.weak = config->weak;
  run(launch);
  for (auto& b : launch.read_sectors)
    for (u64 x : b) launch.counters[COUNT_DISTINCT_READ_SECTORS] += __builtin_popcountll(x);
  for (auto& b : launch.written_sectors)
    for (u64 x : b) launch.counters[COUNT_DISTINCT_WRITTEN_SECTORS] += __builtin_popcountll(x);
  for (size_t i = 0; i < launch.kernel->code.size(); i++) {
    launch.counters[COUNT_WARP_INSTRUCTIONS] += launch.warp_counts[i];
    launch.counters[COUNT_THREAD_INSTRUCTIONS] += launch.thread_counts[i];
    launch.counters[COUNT_WARP_CLASSES + launch.kernel->code[i].op_class] += launch.warp_counts[i];
    launch.counters[COUNT_THREAD_CLASSES + launch.kernel->code[i].op_class] += launch.thread_counts[i];
  }
  for (Program* program : launch.programs) delete program;
  for (auto& p : launch.shadow) free(p.second);
  g_error = launch.error;
  g_reports.clear();
  for (auto& s : launch.reports) g_reports += s + "\n";
  return launch.stop ? launch.code : 0;
}
}
