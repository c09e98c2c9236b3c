// What a kernel, an instruction, a warp, a program and a launch's configuration are.
#pragma once

#include <cstdint>
#include <cstring>
#include <cstdio>
#include <cstdlib>
#include <cmath>
#include <string>
#include <vector>
#include <deque>
#include <unordered_map>
#include <map>
#include <algorithm>
#include <array>
#include <stdexcept>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef __int128 s128;
typedef unsigned __int128 u128;
#define ALWAYS_INLINE inline __attribute__((always_inline))

enum Type : u8 {
  TYPE_NONE,
  TYPE_PRED,
  TYPE_B8,
  TYPE_U8,
  TYPE_S8,
  TYPE_B16,
  TYPE_U16,
  TYPE_S16,
  TYPE_F16,
  TYPE_BF16,
  TYPE_B32,
  TYPE_U32,
  TYPE_S32,
  TYPE_F32,
  TYPE_B64,
  TYPE_U64,
  TYPE_S64,
  TYPE_F64,
  TYPE_F16X2,
  TYPE_BF16X2,
  TYPE_TF32,
  TYPE_B128
};
enum Class : u8 {
  CLASS_INTEGER,
  CLASS_FLOAT,
  CLASS_SPECIAL,
  CLASS_CONVERT,
  CLASS_MOVE,
  CLASS_PREDICATE,
  CLASS_LOAD_GLOBAL,
  CLASS_STORE_GLOBAL,
  CLASS_LOAD_SHARED,
  CLASS_STORE_SHARED,
  CLASS_ATOMIC,
  CLASS_MATRIX,
  CLASS_LOAD_MATRIX,
  CLASS_SHUFFLE,
  CLASS_BARRIER,
  CLASS_BRANCH,
  CLASS_ASYNC_COPY,
  CLASS_PARAMETER,
  CLASS_OTHER,
  CLASS_COUNT
};
enum Kind : u8 { KIND_PLAIN, KIND_BRANCH, KIND_EXIT, KIND_BARRIER, KIND_WARP_SYNC, KIND_TRAP, KIND_NOP };
enum {
  ORDER_WEAK = 1,
  ORDER_RELAXED = 2,
  ORDER_ACQUIRE = 4,
  ORDER_RELEASE = 8,
  CACHE_GLOBAL = 16,
  READ_ONLY = 32,
  ORDER_VOLATILE = 64
};  // memory op flags

struct Warp;
struct Launch;
struct Kernel;
struct Program;
struct Instruction;
typedef void (*Handler)(Warp&, const Instruction&, u32);
struct Instruction {
  Handler handler = nullptr;
  s32 operand[16];    // operands: >=0 register byte offset in the warp's file; <0 offset in the constants (tag
                      // bit 31)
  s64 immediate = 0;  // address offset, lut, ...
  s32 target = -1;
  s32 guard = -1;  // predicate register offset
  bool guard_negated = false;
  u8 op_class = CLASS_OTHER, kind = KIND_PLAIN;
  u8 vector = 1, element_bytes = 4, register_bytes = 4,
     sign_extend = 0;  // memory: vector length, element size, register width, sign extension
  u8 type = 0, source_type = 0, source_bytes = 0, rounding = 0;  // cvt / generic
  u8 order = 0, scope = 0, variant = 0, flag = 0;
  s32 base = 0;  // address register (or none: 0x7fffffff)
  s32 line = 0, source_line = -1;
  std::vector<s32> accumulators;  // of a product of a group of warps, read and written
};
constexpr s32 NO_REGISTER = 0x7fffffff;

struct Parameter {
  std::string name;
  int off, size;
  bool ptr;
};
struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> text;          // per PTX line (for reports)
  std::vector<std::string> source_lines;  // .loc comments
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  size_t register_file_bytes = 0;
  char* constants_base = nullptr;
  size_t constant_bytes = 0;
  int threads[3] = {1, 1, 1};
  int static_shared = 0;
  std::vector<std::pair<s32, int>> specials;      // register offset, id
  std::vector<std::pair<char*, size_t>> globals;  // module-scope data
  std::map<std::string, int> opcodes;
};
enum SpecialRegister {
  SP_TIDX,
  SP_TIDY,
  SP_TIDZ,
  SP_NTIDX,
  SP_NTIDY,
  SP_NTIDZ,
  SP_CTAX,
  SP_CTAY,
  SP_CTAZ,
  SP_NCTAX,
  SP_NCTAY,
  SP_NCTAZ,
  SP_LANE,
  SP_WARP,
  SP_CLK,
  SP_CLK64,
  SP_GT,
  SP_SMID,
  SP_LMLT,
  SP_LMLE,
  SP_LMGT,
  SP_LMGE,
  SP_LMEQ,
  SP_NWARP,
  SP_NSMID
};

Kernel* parse_ptx(const char* text);

enum GroupState : u8 { GROUP_READY, GROUP_AT_BARRIER, GROUP_AWAITS_WARP };
struct Group {
  int pc;
  u32 mask;
  u8 st;
  u8 bar;
};
struct AsyncCopy {
  u64 g[32];
  u32 s[32];
  u32 mask;
  int size;
  u32 read_bytes[32];
  int line;
  const Instruction* in;
};
struct Warp {
  char* registers = nullptr;
  const char* constants = nullptr;
  Launch* launch = nullptr;
  Program* program = nullptr;
  int id = 0, agent = 0;
  u32 alive = 0;
  int pc = 0;
  u32 active = 0;
  int meeting_pc = 0x7fffffff;
  bool has_group = false;  // current group
  std::vector<Group> other_groups;
  std::vector<std::vector<AsyncCopy>> committed_copies;
  std::vector<AsyncCopy> open_copies;
  bool runnable = true, done = false;
  u32 priority = 0, streak = 0;
  u32 warp_syncs = 0;    // bar.warp.sync seen
  u32 since_switch = 0;  // instructions since_switch the last change of group
};
struct BufferedWord {
  u64 data;
  u8 mask;
  u16 warp;
  u8 lane;
  u32 epoch;
};
struct ShadowByte {
  u32 writer, write_time, reader, read_time;
  s32 readers;
  u8 write_strong, read_strong, write_lane, read_lane, write_silent;
  s32 write_line, read_line;
  u32 write_syncs, read_syncs, write_instruction;
};  // we: epoch of its warp
struct NamedBarrier {
  u32 arrived = 0, expected = 0;
};
struct Program {
  int id = 0, x = 0, y = 0, z = 0;
  std::vector<Warp> warps;
  std::vector<char> register_storage;
  char* shared = nullptr;
  std::vector<char> shared_storage;
  size_t shared_bytes = 0;
  u32 threads = 0, live_threads = 0;
  NamedBarrier barriers[16];
  u32 epoch = 0;
  std::unordered_map<u64, BufferedWord> store_buffer;
  std::vector<u64> buffered_keys;
  std::unordered_map<u64, std::array<u8, 32>> cache;
  std::vector<ShadowByte> shadow;
  std::vector<u8> initialised;
  int done_warps = 0;
};
struct Range {
  u64 lo, hi;
  int id;
  int writable;
};

struct Config {  // as _Config of ../binding.py
  s32 grid[3];
  s32 threads[3];
  u64 parameters;
  s32 parameter_bytes;
  s32 shared;
  s32 cooperative;
  u64 seed;
  s32 quantum;
  s32 resident;
  s32 bounds, races, weak, uninitialised, count;
  s32 copies;  // asynchronous copies land 0 at once, 1 when somebody waits, 2 either
  s32 flush;
  s32 evict;
  s32 shuffle;
  u64 most_instructions;
  u64 stall;
  s32 max_reports;
  s32 detail;
  u64 ranges;
  s32 range_count;
  s32 run_ahead;
  u64 find_storage;
  u64 counters;
  u64 instruction_counts;
};
enum {
  COUNT_WARP_INSTRUCTIONS,
  COUNT_THREAD_INSTRUCTIONS,
  COUNT_LOAD_SECTORS,
  COUNT_STORE_SECTORS,
  COUNT_ATOMIC_SECTORS,
  COUNT_LOAD_REQUESTS,
  COUNT_STORE_REQUESTS,
  COUNT_ATOMIC_REQUESTS,
  COUNT_LOAD_BYTES,
  COUNT_STORE_BYTES,
  COUNT_ATOMIC_THREADS,
  COUNT_BLOCK_BARRIERS,
  COUNT_DISTINCT_READ_SECTORS,
  COUNT_DISTINCT_WRITTEN_SECTORS,
  COUNT_SHARED_LOADS,
  COUNT_SHARED_STORES,
  COUNT_SHARED_LOAD_CONFLICTS,
  COUNT_SHARED_STORE_CONFLICTS,
  COUNT_DIVERGENCES,
  COUNT_BENIGN,
  COUNT_UNINITIALISED,
  COUNT_RACES,
  COUNT_INTRA_WARP,
  COUNT_RACES_WITHIN,
  COUNT_RACES_UNCHECKED,
  COUNT_WARP_CLASSES,
  COUNT_THREAD_CLASSES = COUNT_WARP_CLASSES + CLASS_COUNT,
  COUNT_TOTAL = COUNT_THREAD_CLASSES + CLASS_COUNT
};

struct Random {
  u64 s;
  ALWAYS_INLINE u64 next() {
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return s;
  }
  ALWAYS_INLINE u32 below(u32 n) { return (u32)(((next() >> 32) * n) >> 32); }
};
