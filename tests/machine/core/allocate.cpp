// Registers whose lives do not meet share a place, so that a warp's registers stay in the CPU's first cache: liveness
// over the flow graph, then a linear scan over whole intervals. A lane's values are its own, so what is right for one
// thread is right for a warp; only registers of one width share, so that lanes keep to their own bytes.
#include <algorithm>
#include <climits>
#include "parse.h"

namespace machine {
namespace {

using Set = std::vector<u64>;  // a bit per register
inline bool contains(const Set& set, int i) { return set[i >> 6] >> (i & 63) & 1; }
inline void insert(Set& set, int i) { set[i >> 6] |= 1ull << (i & 63); }
template <class F> void each(const Set& set, F f) {
  for (size_t word = 0; word < set.size(); word++) {
    for (u64 left = set[word]; left; left &= left - 1) f((int)word * 64 + __builtin_ctzll(left));
  }
}

struct Block { int first, last; Set used, defined, in, out; std::vector<int> next; };  // last: one past
struct Life { int first = INT_MAX, last = -1; };

struct Allocation {
  Kernel& kernel;
  const std::vector<std::vector<Touch>>& touches;
  std::vector<Operand> registers;
  std::vector<int> widths;
  std::map<Operand, int> number;
  std::vector<Block> blocks;
  std::vector<Life> lives;

  Allocation(Kernel& kernel, const std::vector<std::vector<Touch>>& touches, const Widths& all)
      : kernel(kernel), touches(touches) {
    for (auto& [where, width] : all) {
      number[where] = (int)registers.size();
      registers.push_back(where);
      widths.push_back(width);
    }
  }

  void find_blocks() {
    int size = (int)kernel.code.size();
    std::vector<char> leads(size + 1, 0);
    leads[0] = 1;
    for (const Instruction& in : kernel.code) {
      if (in.kind == Kind::branch) leads[in.target] = 1;
      if (in.kind == Kind::branch || in.kind == Kind::exit) leads[in.index + 1] = 1;
    }
    std::vector<int> block_at(size);
    Set none((registers.size() + 63) / 64);
    for (int i = 0; i < size; i++) {
      if (leads[i]) blocks.push_back({i, i, none, none, none, none, {}});
      blocks.back().last = i + 1;
      block_at[i] = (int)blocks.size() - 1;
    }
    for (int b = 0; b < (int)blocks.size(); b++) {
      const Instruction& end = kernel.code[blocks[b].last - 1];
      bool leaves = end.kind == Kind::branch || end.kind == Kind::exit;
      if (end.kind == Kind::branch) blocks[b].next.push_back(block_at[end.target]);
      if ((!leaves || end.guard != ABSENT) && b + 1 < (int)blocks.size()) blocks[b].next.push_back(b + 1);
    }
  }

  // A guarded write keeps the old value of some lanes: it reads, and defines nothing.
  void find_uses() {
    for (Block& block : blocks) {
      for (int i = block.first; i < block.last; i++) {
        bool partial = kernel.code[i].guard != ABSENT;
        for (const Touch& touch : touches[i]) {
          int r = number[touch.where];
          if ((!touch.written || partial) && !contains(block.defined, r)) insert(block.used, r);
        }
        for (const Touch& touch : touches[i]) {
          if (touch.written && !partial) insert(block.defined, number[touch.where]);
        }
      }
    }
  }

  void find_liveness() {
    for (bool changed = true; changed;) {
      changed = false;
      for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
        for (size_t word = 0; word < block->out.size(); word++) {
          u64 out = 0;
          for (int next : block->next) out |= blocks[next].in[word];
          u64 in = block->used[word] | (out & ~block->defined[word]);
          changed |= out != block->out[word] || in != block->in[word];
          block->out[word] = out;
          block->in[word] = in;
        }
      }
    }
  }

  // A definition lives from just after its instruction, so a source that ends there may give it its place.
  // (Destinations of one instruction never share: both live from the same moment.)
  void find_lives() {
    lives.resize(registers.size());
    auto extend = [&](int r, int moment) {
      lives[r].first = std::min(lives[r].first, moment);
      lives[r].last = std::max(lives[r].last, moment);
    };
    for (Block& block : blocks) {
      each(block.in, [&](int r) { extend(r, block.first); });
      each(block.out, [&](int r) { extend(r, block.last); });
      for (int i = block.first; i < block.last; i++) {
        for (const Touch& touch : touches[i]) extend(number[touch.where], touch.written ? i + 1 : i);
      }
    }
    for (auto& special : kernel.specials) extend(number[special.first], 0);
  }

  std::map<Operand, Operand> assign() {
    std::vector<int> order, active;
    for (int r = 0; r < (int)registers.size(); r++) {
      if (lives[r].last >= 0) order.push_back(r);
    }
    std::sort(order.begin(), order.end(), [&](int a, int b) { return lives[a].first < lives[b].first; });
    std::map<Operand, Operand> moved;
    std::map<int, std::vector<Operand>> free;  // by width
    size_t top = 0;
    for (int r : order) {
      for (size_t k = 0; k < active.size();) {
        if (lives[active[k]].last >= lives[r].first) { k++; continue; }
        free[widths[active[k]]].push_back(moved[registers[active[k]]]);
        active[k] = active.back();
        active.pop_back();
      }
      std::vector<Operand>& places = free[widths[r]];
      if (places.empty()) {
        places.push_back((Operand)top);
        top += widths[r] ? (size_t)widths[r] * LANES : 32;
      }
      moved[registers[r]] = places.back();
      places.pop_back();
      active.push_back(r);
    }
    kernel.register_bytes = top;
    return moved;
  }

  void rename(const std::map<Operand, Operand>& moved) {
    auto rename = [&](Operand& operand) {
      if (auto found = moved.find(operand); found != moved.end()) operand = found->second;
    };
    for (Instruction& in : kernel.code) {
      for (Operand& operand : in.operands) rename(operand);
      rename(in.base);
      rename(in.guard);
      rename(in.member_mask);
    }
    for (auto& list : kernel.lists) {
      for (Operand& operand : list) rename(operand);
    }
    for (auto& special : kernel.specials) rename(special.first);
  }
};

}  // namespace

void allocate(Kernel& kernel, const std::vector<std::vector<Touch>>& touches, const Widths& widths) {
  Allocation allocation(kernel, touches, widths);
  allocation.find_blocks();
  allocation.find_uses();
  allocation.find_liveness();
  allocation.find_lives();
  allocation.rename(allocation.assign());
}

}  // namespace machine
