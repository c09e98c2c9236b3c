// A launch's memory and what is said of it.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include "machine.h"
#include "races.h"

namespace machine {

std::string text(const char* format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  std::string result(vsnprintf(nullptr, 0, format, arguments), 0);
  vsnprintf(&result[0], result.size() + 1, format, again);
  va_end(arguments);
  va_end(again);
  return result;
}

static Storage make_storage(u64 low, u64 high) {
  size_t words = (high - (low & ~31ull)) / 32 / 64 + 2;
  return {low, high, std::vector<u64>(words), std::vector<u64>(words)};
}

static u64 product(const s32* axes) { return (u64)axes[0] * axes[1] * axes[2]; }

Launch::Launch(const Kernel& kernel, const Request& request)
    : kernel(kernel),
      request(request),
      random(request.seed),
      weak(request.weak),
      simple(!request.races && !request.weak) {
  auto* bytes = (const char*)request.parameters;
  parameters.assign(bytes, bytes + request.parameter_bytes);
  parameters.resize(request.parameter_bytes + 64);
  counters = (u64*)request.counters;
  warp_counts = (u64*)request.counts;
  thread_counts = warp_counts + kernel.code.size();
  program_count = product(request.grid);
  warps_per_program = (int)((product(request.threads) + LANES - 1) / LANES);
  auto* bounds = (const u64*)request.storages;
  for (int i = 0; i < request.storage_count; i++) storages.push_back(make_storage(bounds[2 * i], bounds[2 * i + 1]));
  for (const Span& span : kernel.globals) storages.push_back(make_storage((u64)span.data, (u64)span.data + span.bytes));
  std::sort(storages.begin(), storages.end(), [](const Storage& a, const Storage& b) { return a.low < b.low; });
  if (request.races) races = std::make_unique<Races>(*this);
}

Launch::~Launch() {}

Storage* Launch::find(u64 address, u64 bytes) {
  auto holds = [&](const Storage& storage) { return address >= storage.low && address + bytes <= storage.high; };
  if (hot_storage < storages.size() && holds(storages[hot_storage])) return &storages[hot_storage];
  auto after = std::upper_bound(storages.begin(), storages.end(), address,
                                [](u64 a, const Storage& storage) { return a < storage.low; });
  if (after == storages.begin() || !holds(*(after - 1))) return nullptr;
  hot_storage = after - 1 - storages.begin();
  return &storages[hot_storage];
}

bool Launch::find_elsewhere(u64 address, u64 bytes) {
  using Find = int (*)(u64, u64*, u64*);
  u64 low = 0, high = 0;
  if (!request.find_storage || !((Find)request.find_storage)(address, &low, &high)) return false;
  if (address < low || address + bytes > high) return false;
  auto after = std::upper_bound(storages.begin(), storages.end(), low,
                                [](u64 a, const Storage& storage) { return a < storage.low; });
  hot_storage = storages.insert(after, make_storage(low, high)) - storages.begin();
  return true;
}

// --- what is said ----------------------------------------------------------------------------------------------------

const std::string& Kernel::source(const Instruction& in) const {
  static const std::string unknown = "an unknown line";
  return in.source >= 0 ? sources[in.source] : unknown;
}

// "file.py:12:8 @[ caller.py:40:4 ]"
std::string Launch::source(const Instruction& in) const { return kernel.source(in); }

std::string Launch::place(const Warp& warp, const Instruction& in) const {
  const Program& program = *warp.program;
  return text(" at %s [kernel %s, program (%d,%d,%d), warp %d, PTX line %d: %s]", source(in).c_str(),
              kernel.name.c_str(), program.x, program.y, program.z, warp.index, in.line, kernel.text_of(in).c_str());
}

void Launch::stop(Fault why, const std::string& what) {
  if (stopped) return;
  stopped = true;
  fault = why;
  error = what;
}

bool Launch::is_new(const char* kind, const Instruction& in, int other) const {
  return (int)reports.size() < request.max_reports && !reported.count({kind, in.index, other});
}

void Launch::report(const char* kind, const Warp& warp, const Instruction& in, const std::string& what, int other) {
  if (!is_new(kind, in, other)) return;
  reported.insert({kind, in.index, other});
  reports.push_back({kind, what + place(warp, in)});
}

}  // namespace machine
