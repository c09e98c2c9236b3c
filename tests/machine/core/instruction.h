// A kernel as the machine holds it: decoded instructions, parameters, constants. parse.cpp makes one from PTX text.
//
// What the machine is not. It executes PTX, not the SASS that ptxas makes of it: nothing is fused, reordered or left
// out, no register is spilled. Lanes of one warp run in lockstep where their paths meet (the path with the lowest pc
// goes first), so of the races inside a warp only some are seen. Matrix products add exactly and round once; ex2, lg2,
// rcp, sqrt, rsqrt, sin, cos, tanh and the approximate divisions are nearly correctly rounded, where a GPU has
// approximations of its own. NaN payloads are the host's. wgmma reads shared memory and its accumulators when it is
// issued; what is written there before its wait is found by races.cpp only. The weak memory model (weak.cpp) delays
// plain stores and serves plain loads from stale lines; volatile and relaxed loads see memory as it is. Scopes are not
// told apart (a release at .cta orders as one at .gpu does), only a fence at .cta orders nothing.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace machine {

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL_LANES = ~0u;

enum class Type : u8 {
  none, pred, b8, u8, s8, b16, u16, s16, f16, bf16, b32, u32, s32, f32, tf32, f16x2, bf16x2, b64, u64, s64, f64, b128,
  e4m3, e5m2, e4m3x2, e5m2x2
};
int bytes_of(Type type);  // of a value in memory; 0 for a predicate
bool is_float(Type type);
bool is_signed(Type type);

// What an instruction counts as.
enum class Class : u8 {
  integer, fp, special, convert, move, predicate, load_global, store_global, load_shared, store_shared, atomic,
  matrix, load_matrix, shuffle, barrier, branch, async_copy, parameter, local, other, COUNT
};

// How the scheduler treats an instruction: most are executed by the lanes that are there; a collective waits for its
// members first.
enum class Kind : u8 { plain, collective, branch, exit, barrier, trap };

// Memory order and caching of a memory instruction.
enum Order : u8 { RELAXED = 1, ACQUIRE = 2, RELEASE = 4, VOLATILE = 8, PAST_L1 = 16 };
enum class Scope : u8 { block, device, system };

enum Modifier : u8 {
  FLUSH_SUBNORMALS = 1,
  SATURATE = 2,
  RELU = 4,
  NEGATED = 8,
  ALL = 16,
  TRANSPOSED = 32,
  TRANSPOSED_A = 64
};
enum class Rounding : u8 {
  none,
  nearest,
  zero,
  down,
  up,
  integer_nearest,
  integer_zero,
  integer_down,
  integer_up,
  nearest_away
};

enum class Atomic : u8 { add, min, max, bit_and, bit_or, bit_xor, exchange, compare_and_swap, increment, decrement };
enum class Shuffle : u8 { up, down, butterfly, index };
enum class Vote : u8 { all, any, uniform, ballot };

// Where an operand lies: an offset in the warp's registers, or (with the sign bit) in the kernel's constants. A
// register of n bytes is 32 values of n bytes, one per lane; a predicate is one word with a bit per lane.
using Operand = s32;
constexpr Operand ABSENT = 0x7fffffff;
constexpr Operand CONSTANT = (Operand)0x80000000u;

struct Warp; struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 lanes);

struct Instruction {
  Handler execute = nullptr;
  Operand guard = ABSENT;     // predicate, and whether it is negated
  bool guard_negated = false;
  Kind kind = Kind::plain;
  Class counted = Class::other;
  s32 index = 0;              // its place in the kernel
  Operand operands[16];       // destinations first, then as in the text
  // Memory: address = base register (if any) + offset; `elements` values of `element_bytes` in registers of
  // `register_bytes`.
  Operand base = ABSENT;
  s64 offset = 0;
  u8 address_bytes = 8, elements = 1, element_bytes = 4, register_bytes = 4, source_bytes = 4;
  bool sign_extend = false;
  u8 order = 0;
  Scope scope = Scope::system;
  // Of single families.
  Type type = Type::none, source_type = Type::none;
  Rounding rounding = Rounding::none;
  u8 modifiers = 0;
  u8 variant = 0;             // an Atomic, Shuffle, Vote, ... ; the number of a barrier
  u32 members = ALL_LANES;    // collective: lanes that must arrive
  Operand member_mask = ABSENT;  // or a register that names them
  s32 target = -1;            // branch: index of an instruction; otherwise an index or offset of the family
  s64 immediate = 0;
  Handler inner = nullptr;    // setp with a boolean operation: the comparison
  s32 line = 0, source = -1;  // its place in the PTX text, and in Kernel::sources

  Instruction() { for (Operand& operand : operands) operand = ABSENT; }
  bool has(Modifier modifier) const { return modifiers & modifier; }
};

enum class Special : u8 {
  tid_x, tid_y, tid_z, ntid_x, ntid_y, ntid_z, ctaid_x, ctaid_y, ctaid_z, nctaid_x, nctaid_y, nctaid_z, laneid,
  warpid, nwarpid, smid, nsmid, lanemask_lt, lanemask_le, lanemask_gt, lanemask_ge, lanemask_eq
};

struct Parameter { std::string name; int offset, size; bool is_pointer; };
struct Span { char* data; size_t bytes; };

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> text;     // the PTX, by line (from 1)
  std::vector<std::string> sources;  // the comments of .loc: "file:line:column @[ ... ]"
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  size_t register_bytes = 0;         // of a warp
  Span constants{};
  int threads[3] = {1, 1, 1};
  int static_shared = 0;
  size_t local_bytes = 0;            // of a thread
  std::vector<std::pair<Operand, Special>> specials;
  std::vector<Span> globals;         // variables of the module
  std::vector<std::vector<Operand>> lists;  // accumulators of wgmma, which may be many
  std::map<std::string, int> opcodes;

  Kernel() = default;
  Kernel(const Kernel&) = delete;
  ~Kernel();
  const std::string& source(const Instruction& in) const;
  const std::string& text_of(const Instruction& in) const { return text[in.line]; }
};

}  // namespace machine
