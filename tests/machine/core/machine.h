// A launch while it runs: programs (blocks) of warps, memory, what is checked. Everything that the parts of the machine
// share.
#pragma once
#include <array>
#include <deque>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include "counters.h"
#include "instruction.h"

namespace machine {

struct Launch; struct Program; struct Races;

// What core.py asks for. It holds the same structure.
enum class Copies : s32 { at_once, at_the_wait, either };
struct Request {
  s32 grid[3], threads[3];
  u64 parameters, storages, find_storage, counters, counts, seed, stall;
  s32 parameter_bytes, storage_count, shared, cooperative, quantum, run_ahead, resident, shuffle;
  s32 bounds, races, uninitialised, weak, flush, evict;
  Copies copies;
  s32 sectors, bank_conflicts, max_reports, detail;
};

struct Random {
  u64 state;
  explicit Random(u64 seed) : state(seed * 0x9E3779B97F4A7C15ull + 0x1234567) { for (int i = 0; i < 4; i++) next(); }
  u64 next() { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state; }
  u32 below(u32 n) { return (u32)(((next() >> 32) * n) >> 32); }
  bool chance(int per_mille) { return (int)below(1000) < per_mille; }
};

// Lanes of a warp that are at another place than those that run.
enum class Waiting : u8 { ready, at_barrier, for_warp };
struct Group { int pc; u32 lanes; Waiting state; u8 barrier; };

// A cp.async of one warp, issued and not yet done.
struct AsyncCopy { const Instruction* in; u32 lanes; u64 from[LANES]; u32 to[LANES]; u32 bytes[LANES]; };

// What a wgmma that is not waited for reads of shared memory (races only).
struct MatrixRead { const Instruction* in; std::vector<u32> addresses; u32 bytes; u64 digest; };
template <class T> struct Batches {  // issued, and those of each group that was committed, oldest first
  std::vector<T> open;
  std::deque<std::vector<T>> committed;
  void commit() { committed.push_back(std::move(open)); open.clear(); }
  bool empty() const { return open.empty() && committed.empty(); }
};

struct Warp {
  char* registers = nullptr;
  const char* constants = nullptr;
  Launch* launch = nullptr;
  Program* program = nullptr;
  char* local = nullptr;            // local memory of its lanes, one after another
  int index = 0;                    // in its program
  u32 agent = 0;                    // in the launch
  u32 alive = 0;
  // The lanes that run, and where; the others in `others`. At `limit` another group waits at a higher pc, to be joined.
  bool running = false, queued = false, done = false;
  int pc = 0, limit = 0x7fffffff;
  u32 active = 0;
  std::vector<Group> others;
  Batches<AsyncCopy> copies;
  Batches<MatrixRead> matrix_reads;
  u32 priority = 0, streak = 0;     // run_ahead
  u32 warp_barriers = 0;            // bar.warp.sync so far
  u32 since_switch = 0;             // instructions since the group changed
  u32 proxy_fence = 0;              // moment of its last fence.proxy.async
};

struct Barrier { u32 arrived = 0, expected = 0; };

// A word of a store buffer: whose store, between which barriers of the program.
struct BufferedWord { u64 data; u8 mask; u8 lane; u16 warp; u32 epoch; };

// What the race detector knows of one byte: the last write, and the reads since. Agents are stored plus one, so that
// zeroes mean nobody.
struct ByteHistory {
  u32 writer, write_time, reader, read_time;  // reader MANY: more than one, in Races
  u32 many;
  s32 write_index, read_index;                // instructions
  u32 write_warp_barriers, read_warp_barriers;
  u32 write_moment;                           // Launch::moment
  u8 write_strong, read_strong, write_lane, read_lane, write_silent;
};

struct Program {
  int id, x, y, z;
  std::vector<Warp> warps;
  std::vector<char> register_memory, shared_memory, local_memory;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  u32 alive = 0;                     // threads
  int done_warps = 0;
  Barrier barriers[16];
  u32 epoch = 0;                     // barriers completed
  // Weak memory.
  std::unordered_map<u64, BufferedWord> buffer;  // by address / 8
  std::vector<u64> buffered;                     // its keys, some of them gone
  std::unordered_map<u64, std::array<u8, 32>> l1;  // by address / 32
  // Checks of shared memory, per byte.
  std::vector<ByteHistory> history;
  std::vector<u8> initialised;
  bool done() const { return done_warps == (int)warps.size(); }
};

struct Storage { u64 low, high; std::vector<u64> read, written; };  // with a bit per sector that was touched
struct Report { std::string kind, text; };
enum class Fault : int { none, bounds = 2, misaligned = 3, trap = 4, deadlock = 5, livelock = 7 };

struct Launch {
  Launch(const Kernel& kernel, const Request& request);
  ~Launch();
  Launch(const Launch&) = delete;

  const Kernel& kernel;
  const Request& request;
  std::vector<char> parameters;
  Random random;
  u64 *counters, *warp_counts, *thread_counts;  // the last two per instruction
  u64 moment = 0;                    // warp instructions so far
  u64 last_change = 0;               // moment of the last change of memory
  int warps_per_program;
  u64 program_count, next_program = 0;
  std::vector<std::unique_ptr<Program>> programs;  // resident
  std::vector<Warp*> ready;
  std::vector<Storage> storages;     // ascending
  size_t hot_storage = 0;
  std::unique_ptr<Races> races;      // null unless asked for
  bool weak, simple;                 // simple: neither races nor weak memory
  std::vector<Report> reports;
  std::set<std::tuple<std::string, int, int>> reported;  // kind, instruction, other
  bool stopped = false;
  Fault fault = Fault::none;
  std::string error;

  u64& counter(Counter which) { return counters[(int)which]; }
  void count(Counter which, u64 n = 1) { counters[(int)which] += n; }
  void stop(Fault why, const std::string& text);
  // One report for every kind and instruction (and `other`, an instruction that it met); is_new: it would be told.
  bool is_new(const char* kind, const Instruction& in, int other = -1) const;
  void report(const char* kind, const Warp& warp, const Instruction& in, const std::string& text, int other = -1);
  std::string place(const Warp& warp, const Instruction& in) const;
  std::string source(const Instruction& in) const;
  Storage* find(u64 address, u64 bytes);
  bool find_elsewhere(u64 address, u64 bytes);  // asks core.py
  void run();                        // schedule.cpp
};

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace machine
