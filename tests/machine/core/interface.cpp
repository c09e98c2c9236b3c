// What core.py calls.
#include <algorithm>
#include <cstdio>
#include "machine.h"
#include "parse.h"
#include "races.h"

using namespace machine;

namespace {

thread_local std::string error, reports;
enum Number {
  PARAMETERS,
  PARAMETER_BYTES,
  OFFSET,
  SIZE,
  IS_POINTER,
  THREADS,
  INSTRUCTIONS,
  LINE,
  SOURCE,
  REGISTER_BYTES
};  // as in core.py

void total(Launch& launch) {
  for (const Storage& storage : launch.storages) {
    for (u64 word : storage.read) launch.count(Counter::distinct_read_sectors, __builtin_popcountll(word));
    for (u64 word : storage.written) launch.count(Counter::distinct_written_sectors, __builtin_popcountll(word));
  }
  u64* by_class = launch.counters + (int)Counter::COUNT;
  for (const Instruction& in : launch.kernel.code) {
    u64 warps = launch.warp_counts[in.index], threads = launch.thread_counts[in.index];
    launch.count(Counter::warp_instructions, warps);
    launch.count(Counter::thread_instructions, threads);
    by_class[(int)in.counted] += warps;
    by_class[(int)Class::COUNT + (int)in.counted] += threads;
  }
}

}  // namespace

extern "C" {

void* machine_parse(const char* ptx, char* message, int size) {
  try {
    return parse(ptx).release();
  } catch (const std::exception& failure) {
    snprintf(message, size, "%s", failure.what());
    return nullptr;
  }
}

void machine_free(void* kernel) { delete (Kernel*)kernel; }

int machine_number(void* handle, int what, int index) {
  const Kernel& kernel = *(const Kernel*)handle;
  switch (what) {
    case PARAMETERS: return (int)kernel.parameters.size();
    case PARAMETER_BYTES: return kernel.parameter_bytes;
    case OFFSET: return kernel.parameters[index].offset;
    case SIZE: return kernel.parameters[index].size;
    case IS_POINTER: return kernel.parameters[index].is_pointer;
    case THREADS: return kernel.threads[index];
    case INSTRUCTIONS: return (int)kernel.code.size();
    case LINE: return kernel.code[index].line;
    case SOURCE: return kernel.code[index].source;
    case REGISTER_BYTES: return (int)kernel.register_bytes;
  }
  return 0;
}

const char* machine_source(void* handle, int index) {
  const Kernel& kernel = *(const Kernel*)handle;
  return kernel.source(kernel.code[index]).c_str();
}

const char* machine_opcodes(void* kernel) {
  static thread_local std::string list;
  list.clear();
  for (auto& [opcode, count] : ((const Kernel*)kernel)->opcodes) list += opcode + " " + std::to_string(count) + "\n";
  return list.c_str();
}

const char* machine_counter(int i) { return i < (int)Counter::COUNT ? COUNTER_NAMES[i] : nullptr; }
const char* machine_class(int i) { return i < (int)Class::COUNT ? CLASS_NAMES[i] : nullptr; }
int machine_request_bytes() { return sizeof(Request); }

int machine_run(void* kernel, const Request* request) {
  Launch launch(*(const Kernel*)kernel, *request);
  launch.run();
  total(launch);
  error = launch.error;
  reports.clear();
  for (const Report& report : launch.reports) reports += report.kind + "\x1f" + report.text + "\x1e";
  return (int)launch.fault;
}

const char* machine_error() { return error.c_str(); }
const char* machine_reports() { return reports.c_str(); }

}  // extern "C"
