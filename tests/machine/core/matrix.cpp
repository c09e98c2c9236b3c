// Matrix instructions: mma of a warp, wgmma of four warps, ldmatrix and stmatrix. Products are summed exactly (in
// double, where products of these types are exact) and rounded once.
#include <algorithm>
#include "memory.h"
#include "numbers.h"
#include "races.h"
#include "table.h"

namespace machine {

// --- elements --------------------------------------------------------------------------------------------------------

// Element `h` of a word of them.
template <Type type> static float element(u32 word, int h) {
  if constexpr (type == Type::f16) return widen(Half{(u16)(word >> (16 * h))});
  if constexpr (type == Type::bf16) return widen(Bfloat{(u16)(word >> (16 * h))});
  if constexpr (type == Type::tf32) return bits_as<float>(word & ~0x1fffu);
  if constexpr (type == Type::s8) return (s8)(word >> (8 * h));
  if constexpr (type == Type::u8) return (u8)(word >> (8 * h));
  if constexpr (type == Type::e4m3) return widen((u8)(word >> (8 * h)), E4M3);
  return widen((u8)(word >> (8 * h)), E5M2);
}
template <Type type> constexpr int BYTES = type == Type::tf32 ? 4 : type == Type::f16 || type == Type::bf16 ? 2 : 1;

template <Type value> struct TypeTag { static constexpr Type type = value; };
template <class F> static void with_type(Type type, F f) {
  switch (type) {
    case Type::f16: return f(TypeTag<Type::f16>());
    case Type::bf16: return f(TypeTag<Type::bf16>());
    case Type::tf32: return f(TypeTag<Type::tf32>());
    case Type::s8: return f(TypeTag<Type::s8>());
    case Type::u8: return f(TypeTag<Type::u8>());
    case Type::e4m3: return f(TypeTag<Type::e4m3>());
    default: return f(TypeTag<Type::e5m2>());
  }
}

// A warp's registers of one operand: lane 4g + t has, of every 8 rows (or columns), number g; and per word `per`
// neighbours along k. f(register, lane, k, value), k being that of the first block of 4 * per.
template <Type type, class F> static void each_element(const Warp& warp, const Operand* operands, int registers, F f) {
  constexpr int per = 4 / BYTES<type>;
  for (int r = 0; r < registers; r++) {
    const u32* words = source<u32>(warp, operands[r]);
    for (int h = 0; h < per; h++) {
      for (int lane = 0; lane < LANES; lane++) f(r, lane, per * (lane & 3) + h, element<type>(words[lane], h));
    }
  }
}

struct ProductA { float at[16][32]; };  // 16 rows of k

template <Type type>
static void a_from_registers(const Warp& warp, const Operand* operands, int registers, ProductA& a) {
  each_element<type>(warp, operands, registers, [&](int r, int lane, int k, float value) {
    a.at[(lane >> 2) + 8 * (r & 1)][k + 16 / BYTES<type> * (r >> 1)] = value;
  });
}

// --- mma -------------------------------------------------------------------------------------------------------------

// Register r of lane 4g + t holds row g (of r >= 2: g + 8) and column 2t + (r & 1) of 8.
inline int row_of(int r, int lane) { return (lane >> 2) + 8 * (r >> 1); }
inline int column_of(int r, int lane) { return 2 * (lane & 3) + (r & 1); }

using Sums = double[16][8];

// Results with their addends, from registers 12.. of the instruction.
template <class T> static void add_and_write(Warp& warp, const Instruction& in, const Sums& sums) {
  T results[4][LANES];
  for (int r = 0; r < 4; r++) {
    const T* addends = source<T>(warp, in.operands[12 + r]);
    for (int lane = 0; lane < LANES; lane++) {
      double sum = sums[row_of(r, lane)][column_of(r, lane)];
      if constexpr (std::is_same_v<T, float>) results[r][lane] = (float)(sum + addends[lane]);
      else results[r][lane] = addends[lane] + (u32)(s32)sum;
    }
  }
  for (int r = 0; r < 4; r++) memcpy(destination<T>(warp, in.operands[r]), results[r], sizeof results[r]);
}
static void add_and_write_halves(Warp& warp, const Instruction& in, const Sums& sums) {  // two neighbours in a register
  for (int r = 0; r < 2; r++) {
    HalfPair results[LANES];
    const HalfPair* addends = source<HalfPair>(warp, in.operands[12 + r]);
    for (int lane = 0; lane < LANES; lane++) {
      const double* pair = &sums[row_of(2 * r, lane)][column_of(0, lane)];
      results[lane] = {narrow<Half>((float)(pair[0] + widen(addends[lane].low))),
                       narrow<Half>((float)(pair[1] + widen(addends[lane].high)))};
    }
    memcpy(destination<HalfPair>(warp, in.operands[r]), results, sizeof results);
  }
}

template <Type type> static void multiply(Warp& warp, const Instruction& in) {
  int k_size = (int)in.immediate;
  ProductA a;
  double b[32][8];
  a_from_registers<type>(warp, in.operands + 4, in.elements, a);
  each_element<type>(warp, in.operands + 8, in.elements / 2, [&](int r, int lane, int k, float value) {
    b[k + 16 / BYTES<type> * r][lane >> 2] = value;
  });
  Sums sums;
  for (int row = 0; row < 16; row++) {
    double sum[8] = {};
    for (int k = 0; k < k_size; k++) {
      double x = a.at[row][k];
      for (int n = 0; n < 8; n++) sum[n] += x * b[k][n];
    }
    memcpy(sums[row], sum, sizeof sum);
  }
  if (in.type == Type::f32) add_and_write<float>(warp, in, sums);
  else if (in.type == Type::s32) add_and_write<u32>(warp, in, sums);
  else add_and_write_halves(warp, in, sums);
}

void multiply_matrices(Warp& warp, const Instruction& in, u32) {
  with_type(in.source_type, [&](auto tag) { multiply<decltype(tag)::type>(warp, in); });
}

// --- ldmatrix, stmatrix ----------------------------------------------------------------------------------------------

// Lane 8v + r gives the address of row r (16 bytes) of matrix v. Lane 4g + t has elements 2t and 2t + 1 of row g;
// transposed, of column g.
static bool row_addresses(Warp& warp, const Instruction& in, u64* at) {
  addresses(warp, in, at);
  u32 lanes = in.elements == 4 ? ALL_LANES : in.elements == 2 ? 0xffff : 0xff;
  return check_shared(warp, in, lanes, at, 16);
}

using Matrix = u16[8][8];  // as memory has it, and (row by row) as the lanes have it
static void transpose(Matrix& matrix) {
  for (int row = 0; row < 8; row++) {
    for (int column = 0; column < row; column++) std::swap(matrix[row][column], matrix[column][row]);
  }
}

void load_matrix(Warp& warp, const Instruction& in, u32 lanes) {
  u64 at[LANES];
  if (!row_addresses(warp, in, at)) return;
  warp.launch->count(Counter::shared_loads, in.elements);
  for (int i = 0; watches_shared(warp) && i < 8 * in.elements; i++) watch_shared(warp, in, i, at[i], 16, nullptr);
  for (int m = 0; m < in.elements; m++) {
    Matrix matrix;
    for (int row = 0; row < 8; row++) memcpy(matrix[row], warp.program->shared + at[8 * m + row], 16);
    if (in.has(TRANSPOSED)) transpose(matrix);
    write(destination<u32>(warp, in.operands[m]), (const u32*)matrix, lanes);
  }
}

void store_matrix(Warp& warp, const Instruction& in, u32) {
  u64 at[LANES];
  if (!row_addresses(warp, in, at)) return;
  warp.launch->count(Counter::shared_stores, in.elements);
  for (int m = 0; m < in.elements; m++) {
    Matrix matrix;
    memcpy(matrix, source<u32>(warp, in.operands[m]), sizeof matrix);
    if (in.has(TRANSPOSED)) transpose(matrix);
    for (int row = 0; row < 8; row++) {
      int lane = 8 * m + row;
      if (watches_shared(warp)) watch_shared(warp, in, lane, at[lane], 16, (const u8*)matrix[row]);
      memcpy(warp.program->shared + at[lane], matrix[row], 16);
    }
  }
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

// An operand in shared memory: `index` is its row (of a) or column (of b). Rows of `span` bytes, in groups of 8;
// 16-byte units of a row are permuted by the number of the row ("swizzled"), which shows in the address.
struct SharedOperand {
  u32 start, leading, stride, span, swizzle;
  int bytes;
  bool k_runs_along_rows;

  SharedOperand(u64 descriptor, int bytes, bool transposed) : bytes(bytes), k_runs_along_rows(!transposed) {
    auto field = [&](int shift) { return (u32)(descriptor >> shift & 0x3fff) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    static const u32 spans[] = {16, 128, 64, 32}, swizzles[] = {0, 7, 3, 1};
    span = spans[descriptor >> 62], swizzle = swizzles[descriptor >> 62];
    if (transposed && span == 16) std::swap(leading, stride);
  }
  u32 address(int index, int k) const {
    u32 offset;
    if (k_runs_along_rows) {
      offset = index / 8 * stride + index % 8 * span + k * bytes / span * leading + k * bytes % span;
    } else {
      int in_row = (int)span / bytes;
      offset = index / in_row * leading + index % in_row * bytes + k / 8 * stride + k % 8 * span;
    }
    u32 address = start + offset;
    return address ^ (address >> 7 & swizzle) << 4;
  }
};

// Reads through a descriptor, and remembers the 16-byte units it touched.
template <Type type> struct SharedReader {
  Warp& warp;
  MatrixRead read{};
  bool failed = false;

  float operator()(const SharedOperand& operand, int index, int k) {
    u32 address = operand.address(index, k), word = 0;
    if (address + BYTES<type> > warp.program->shared_bytes) {
      failed = true;
      return 0;
    }
    if (address % 16 == 0 && warp.launch->races) read.addresses.push_back(address);
    memcpy(&word, warp.program->shared + address, BYTES<type>);
    return element<type>(word, 0);
  }
};

constexpr int MOST_COLUMNS = 256;

// Each of the four warps multiplies its 16 rows of a with all of b.
template <Type type> static void multiply_rows(Warp& warp, const Instruction& in) {
  Launch& launch = *warp.launch;
  int columns = (int)in.immediate, first_row = warp.index % 4 * 16;
  constexpr int k_size = 32 / BYTES<type>;
  SharedReader<type> reader{warp};
  ProductA a;
  if (in.variant) {
    a_from_registers<type>(warp, in.operands, 4, a);
  } else {
    SharedOperand shared(source<u64>(warp, in.operands[0])[0], BYTES<type>, in.has(TRANSPOSED_A));
    for (int row = 0; row < 16; row++) {
      for (int k = 0; k < k_size; k++) a.at[row][k] = reader(shared, first_row + row, k);
    }
  }
  SharedOperand shared(source<u64>(warp, in.operands[4])[0], BYTES<type>, in.has(TRANSPOSED));
  static thread_local float b[k_size][MOST_COLUMNS];
  for (int n = 0; n < columns; n++) {
    for (int k = 0; k < k_size; k++) b[k][n] = reader(shared, n, k);
  }
  if (reader.failed) {
    launch.report("bounds", warp, in, "wgmma reads beyond shared memory");
    return launch.stop(Fault::bounds, "bounds: wgmma reads beyond shared memory" + launch.place(warp, in));
  }
  static thread_local double sums[16][MOST_COLUMNS];
  for (int row = 0; row < 16; row++) {
    std::fill(sums[row], sums[row] + columns, 0);
    for (int k = 0; k < k_size; k++) {
      double x = a.at[row][k];
      for (int n = 0; n < columns; n++) sums[row][n] += x * b[k][n];
    }
  }
  bool adds = *source<u32>(warp, in.operands[5]) & 1;
  const std::vector<Operand>& accumulators = launch.kernel.lists[in.target];
  for (int r = 0; r < (int)accumulators.size(); r++) {
    float* to = destination<float>(warp, accumulators[r]);
    for (int i = 0; i < LANES; i++) {
      double sum = sums[row_of(r & 3, i)][8 * (r / 4) + column_of(r & 3, i)];
      to[i] = (float)(adds ? sum + to[i] : sum);
    }
  }
  if (!launch.races) return;
  reader.read.in = &in;
  reader.read.bytes = 16;
  launch.races->matrix_read(warp, std::move(reader.read));
}

void multiply_group(Warp& warp, const Instruction& in, u32) {
  with_type(in.source_type, [&](auto tag) { multiply_rows<decltype(tag)::type>(warp, in); });
}

void commit_group(Warp& warp, const Instruction&, u32) {
  if (warp.launch->races) warp.matrix_reads.commit();
}

void wait_group(Warp& warp, const Instruction& in, u32) {
  for (auto& reads = warp.matrix_reads.committed; (s64)reads.size() > in.immediate; reads.pop_front()) {
    for (const MatrixRead& read : reads.front()) warp.launch->races->matrix_done(warp, read);
  }
}

}  // namespace machine
