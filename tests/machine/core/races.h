// Races by happens-before, in shared and in global memory. An agent is a warp. A clock says of every agent up to which
// of its times its actions are known to have happened; bar.sync, releases that an acquire reads from, and fences pass
// clocks on. Two accesses to one byte, one of them a write, race if neither is known to the other and not both are
// atomic ("strong"). Writes of the value that is there are counted as benign.
//
// Clocks are sparse: a dense part for the warps of one program, and a list of what came from elsewhere, shared by all
// who learnt the same. So the number of programs is not limited; the memory for histories of bytes is, and accesses
// beyond it count as races_unchecked.
#pragma once
#include "machine.h"

namespace machine {

struct Known { u32 agent, time; };
using Knowledge = std::shared_ptr<const std::vector<Known>>;  // ascending by agent; null: nothing

class Races {
 public:
  explicit Races(Launch& launch);
  ~Races();
  void start(const Program& program);
  void end(const Program& program);

  void global_read(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes);
  void global_write(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* old, const u8* now);
  void global_atomic(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, bool changes);
  void shared_read(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes);
  void shared_write(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* old, const u8* now);
  void shared_atomic(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes);

  void fence(Warp& warp);
  void barrier(Program& program, const std::vector<int>& warps);

  // wgmma reads shared memory from its issue to its wait, through another proxy than ordinary stores.
  void matrix_read(Warp& warp, MatrixRead read);
  void matrix_done(Warp& warp, const MatrixRead& read);

 private:
  struct Agent {
    std::vector<u32> inside;   // times of the program's own warps
    Knowledge outside;         // of other programs
    Knowledge pending;         // read by relaxed accesses: known after a fence
    Knowledge at_fence;        // what a relaxed write after the last fence releases
  };
  struct Access { Warp& warp; const Instruction& in; int lane; bool strong, shared; const Agent& self; u32 now; };
  struct Reader { u32 agent, time; s32 index; bool strong; };

  Agent& agent(const Warp& warp) { return agents[warp.program->id][warp.index]; }
  Access access(Warp& warp, const Instruction& in, int lane, bool strong, bool shared) {
    const Agent& self = agent(warp);
    return {warp, in, lane, strong, shared, self, self.inside[warp.index]};
  }
  u32 known_time(const Access& access, u32 agent);
  Knowledge all_known(const Warp& warp);
  void learn(const Warp& warp, const Knowledge& knowledge);
  void acquire(const Warp& warp, u64 address, bool at_once);
  void release(const Warp& warp, u64 address, bool releases, bool read_modify_write);

  ByteHistory* global_history(u64 address);
  [[gnu::always_inline]] void read(const Access& access, u64 address, ByteHistory& history);
  [[gnu::always_inline]] void write(const Access& access, u64 address, ByteHistory& history, bool same);
  [[gnu::always_inline]] void check_written(const Access& access, u64 address, const ByteHistory& history, bool same);
  [[gnu::always_inline]] void check_readers(const Access& access, u64 address, const ByteHistory& history, bool same);
  void add_reader(const Access& access, ByteHistory& history);
  void conflict(const Access& access, u64 address, const char* what, u32 other, s32 other_index, bool benign);
  void within_warp(const Access& access, u64 address, const char* what, int other_lane, s32 other_index);
  std::string other_place(u32 agent, s32 index);
  static u64 digest(const Program& program, const MatrixRead& read);

  Launch& launch;
  u32 warps;                                          // of a program
  std::vector<std::vector<Agent>> agents;             // by program
  std::unordered_map<u64, Knowledge> released;        // by address
  std::unordered_map<u64, ByteHistory*> pages;        // of global memory
  u64 hot_page = ~0ull;
  ByteHistory* hot_histories = nullptr;
  std::vector<std::vector<Reader>> readers;           // of bytes with more than one
  std::vector<u32> unused_readers;
};

}  // namespace machine
