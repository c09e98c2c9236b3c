// Instructions that only compute: opcode -> handler, with the widths of its operands. arithmetic.cpp fills it.
#pragma once
#include <string>
#include "instruction.h"

namespace machine {

struct Plain {
  Handler execute;
  Class counted;
  int operands;     // destination and sources
  int widths[6];    // of their registers in bytes; 0: predicate
};
const Plain* find_plain(const std::string& opcode);  // null: no such instruction

// setp on pairs of 16-bit floats, which has a destination for each of the two.
Handler find_pair_comparison(Type type);  // null: no such type. variant: as in COMPARISONS
constexpr const char* COMPARISONS[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                       "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

// cvt in its common forms, by opcode and register widths ("cvt.s64.s32:84"); null: the general handler is needed.
Handler find_conversion(const std::string& key);

// mov.b64 d, {a, b} and mov.b64 {a, b}, s: bytes of the whole, of a part, and of the registers of parts.
Handler find_vector_move(bool unpacks, int whole, int part, int register_bytes);

// Handlers that decode.cpp names.
void nothing(Warp&, const Instruction&, u32);
void combined_comparison(Warp&, const Instruction&, u32);   // setp.lt.and ...
void load_parameter(Warp&, const Instruction&, u32);
void read_clock(Warp&, const Instruction&, u32);
void convert(Warp&, const Instruction&, u32);
void convert_pair(Warp&, const Instruction&, u32);          // cvt.rn.bf16x2.f32 d, high, low
void convert_tiny_from_floats(Warp&, const Instruction&, u32);
void convert_tiny_from_halves(Warp&, const Instruction&, u32);
void convert_tiny_to_halves(Warp&, const Instruction&, u32);
void shuffle(Warp&, const Instruction&, u32);
void butterfly(Warp&, const Instruction&, u32);
void vote(Warp&, const Instruction&, u32);
void active_mask(Warp&, const Instruction&, u32);
void match(Warp&, const Instruction&, u32);
void reduce(Warp&, const Instruction&, u32);
void warp_barrier(Warp&, const Instruction&, u32);
void multiply_matrices(Warp&, const Instruction&, u32);
void load_matrix(Warp&, const Instruction&, u32);
void store_matrix(Warp&, const Instruction&, u32);
void multiply_group(Warp&, const Instruction&, u32);        // wgmma
void commit_group(Warp&, const Instruction&, u32);
void wait_group(Warp&, const Instruction&, u32);
void proxy_fence(Warp&, const Instruction&, u32);
void load_global(Warp&, const Instruction&, u32);
void store_global(Warp&, const Instruction&, u32);
void load_shared(Warp&, const Instruction&, u32);
void store_shared(Warp&, const Instruction&, u32);
void load_local(Warp&, const Instruction&, u32);
void store_local(Warp&, const Instruction&, u32);
void copy_async(Warp&, const Instruction&, u32);
void commit_copies(Warp&, const Instruction&, u32);
void wait_copies(Warp&, const Instruction&, u32);
void atomic_global(Warp&, const Instruction&, u32);
void atomic_shared(Warp&, const Instruction&, u32);
void fence(Warp&, const Instruction&, u32);

}  // namespace machine
