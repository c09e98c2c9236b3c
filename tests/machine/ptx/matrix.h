// Products of small matrices by a warp.
#pragma once

// mma: o[0..3] d, o[4..7] a, o[8..11] b, o[12..15] c. variant: shape. t1: operand type, t2: accumulator type
enum { MMA_16816, MMA_1688, MMA_1688TF, MMA_16832, MMA_884, MMA_1684TF };
H(multiply_matrices) {
  alignas(32) float A[16][32], B[32][8], Cm[16][8];
  int K = in.variant == MMA_16816 ? 16 : in.variant == MMA_16832 ? 32 : in.variant == MMA_1684TF ? 4 : 8;
  if (in.variant == MMA_884) {
    double a[8][4], b[4][8], c[8][8];
    for (int i = 0; i < 32; i++) {
      a[i >> 2][i & 3] = source<double>(w, in.operand[4])[i];
      b[i & 3][i >> 2] = source<double>(w, in.operand[8])[i];
      c[i >> 2][2 * (i & 3)] = source<double>(w, in.operand[12])[i];
      c[i >> 2][2 * (i & 3) + 1] = source<double>(w, in.operand[13])[i];
    }
    for (int r = 0; r < 8; r++)
      for (int n = 0; n < 8; n++) {
        double s = c[r][n];
        for (int k = 0; k < 4; k++) s = __builtin_fma(a[r][k], b[k][n], s);
        c[r][n] = s;
      }
    for (int i = 0; i < 32; i++) {
      destination<double>(w, in.operand[0])[i] = c[i >> 2][2 * (i & 3)];
      destination<double>(w, in.operand[1])[i] = c[i >> 2][2 * (i & 3) + 1];
    }
    return;
  }
  bool isint = in.source_type == TYPE_S32;
  u32 CI[4][32];
  if (isint)
    for (int r = 0; r < 4; r++) memcpy(CI[r], source<u32>(w, in.operand[12 + r]), 128);
  for (int i = 0; i < 32; i++) {
    int g = i >> 2, t = i & 3;
    auto cv = [&](u32 x, int h) -> float {
      u16 v = (u16)(x >> (16 * h));
      return in.type == TYPE_BF16 ? float_of_bf16(v) : float_of_fp16(v);
    };
    auto tf = [&](u32 x) -> float { return float_of_bits(x & ~0x1fffu); };
    if (in.variant == MMA_16816) {
      for (int r = 0; r < 4; r++) {
        u32 x = source<u32>(w, in.operand[4 + r])[i];
        for (int h = 0; h < 2; h++) A[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = cv(x, h);
      }
      for (int r = 0; r < 2; r++) {
        u32 x = source<u32>(w, in.operand[8 + r])[i];
        for (int h = 0; h < 2; h++) B[2 * t + h + 8 * r][g] = cv(x, h);
      }
    } else if (in.variant == MMA_1688) {
      for (int r = 0; r < 2; r++) {
        u32 x = source<u32>(w, in.operand[4 + r])[i];
        for (int h = 0; h < 2; h++) A[g + 8 * r][2 * t + h] = cv(x, h);
      }
      u32 x = source<u32>(w, in.operand[8])[i];
      for (int h = 0; h < 2; h++) B[2 * t + h][g] = cv(x, h);
    } else if (in.variant == MMA_1688TF) {
      for (int r = 0; r < 4; r++)
        A[g + 8 * (r & 1)][t + 4 * (r >> 1)] = tf(source<u32>(w, in.operand[4 + r])[i]);
      for (int r = 0; r < 2; r++) B[t + 4 * r][g] = tf(source<u32>(w, in.operand[8 + r])[i]);
    } else if (in.variant == MMA_1684TF) {
      for (int r = 0; r < 2; r++) A[g + 8 * r][t] = tf(source<u32>(w, in.operand[4 + r])[i]);
      B[t][g] = tf(source<u32>(w, in.operand[8])[i]);
    } else {
      auto by = [&](u32 x, int h) -> float {
        u8 v = (u8)(x >> (8 * h));
        return in.type == TYPE_S8 ? (float)(s8)v : (float)v;
      };
      for (int r = 0; r < 4; r++) {
        u32 x = source<u32>(w, in.operand[4 + r])[i];
        for (int h = 0; h < 4; h++) A[g + 8 * (r & 1)][4 * t + h + 16 * (r >> 1)] = by(x, h);
      }
      for (int r = 0; r < 2; r++) {
        u32 x = source<u32>(w, in.operand[8 + r])[i];
        for (int h = 0; h < 4; h++) B[4 * t + h + 16 * r][g] = by(x, h);
      }
    }
    for (int r = 0; r < 4; r++) {
      float c;
      if (in.source_type == TYPE_F16)
        c = float_of_fp16((u16)(source<u32>(w, in.operand[12 + (r >> 1)])[i] >> (16 * (r & 1))));
      else if (isint)
        c = 0;
      else
        c = source<float>(w, in.operand[12 + r])[i];
      Cm[g + 8 * (r >> 1)][2 * t + (r & 1)] = c;
    }
  }
  // products of 16-bit operands are exact in double; one rounding to the accumulator's type at the end
  alignas(32) float R[16][8];
  s32 RI[16][8];
  for (int r = 0; r < 16; r++) {
    double s[8];
    for (int n = 0; n < 8; n++) s[n] = 0;
    for (int k = 0; k < K; k++) {
      double x = A[r][k];
      for (int n = 0; n < 8; n++) s[n] += x * B[k][n];
    }
    for (int n = 0; n < 8; n++) {
      R[r][n] = (float)(s[n] + Cm[r][n]);
      RI[r][n] = (s32)s[n];
    }
  }
  for (int i = 0; i < 32; i++) {
    int g = i >> 2, t = i & 3;
    for (int r = 0; r < 4; r++) {
      int y = g + 8 * (r >> 1), x = 2 * t + (r & 1);
      if (isint) {
        u32 c = CI[r][i];
        destination<u32>(w, in.operand[r])[i] = c + (u32)RI[y][x];
      } else if (in.source_type == TYPE_F16) {
        u16* d = (u16*)(destination<u32>(w, in.operand[r >> 1]) + i);
        d[r & 1] = fp16_of_float(R[y][x]);
      } else
        destination<float>(w, in.operand[r])[i] = R[y][x];
    }
  }
}

// ---------------------------------------------------------------- products of a group of four warps (wgmma,
// sm_90)
//
// D [64, N] += A [64, 16] B [16, N] in 16-bit numbers. A warp makes the 16 rows of D that are its own; B, and A
// unless it is in registers, lie in shared memory as a descriptor says. The product is made when it is issued:
// a wait that is missing before shared memory is written again is not seen.

struct Operand {  // a matrix of 16-bit numbers in shared memory, by its descriptor
  u64 start, leading, stride;
  int width;    // bytes of a swizzled row; 16 without a swizzle
  bool across;  // rows (of A; columns of B) lie next to each other, not the 16 numbers that are summed over

  Operand(u64 descriptor, bool is_across) : across(is_across) {
    start = (descriptor & 0x3fff) << 4;
    leading = ((descriptor >> 16) & 0x3fff) << 4;
    stride = ((descriptor >> 32) & 0x3fff) << 4;
    static const int WIDTHS[4] = {16, 128, 64, 32};
    width = WIDTHS[descriptor >> 62];
  }
  u64 address(int row, int k) const {
    u64 at = start;
    if (width == 16) {  // tiles of 8 rows of 16 bytes
      u64 tile = across ? (row / 8) * stride + (k / 8) * leading : (row / 8) * stride + (k / 8) * leading;
      return at + tile + (across ? (k % 8) * 16 + (row % 8) * 2 : (row % 8) * 16 + (k % 8) * 2);
    }
    int per_row = width / 2;
    if (across)
      at += (row / per_row) * leading + (k / 8) * stride + (k % 8) * width + (row % per_row) * 2;
    else
      at += (row / 8) * stride + (row % 8) * width + k * 2;
    return at ^ (((at >> 7) & (width / 16 - 1)) << 4);
  }
};

static u16 read_operand(Warp& w, const Instruction& in, const Operand& operand, int row, int k, int lane) {
  u64 at = operand.address(row, k);
  if (at + 2 > w.program->shared_bytes) {
    w.launch->fail(2, "wgmma beyond shared memory" + w.launch->where(w, in));
    return 0;
  }
  if (w.launch->race_mode | w.launch->config->uninitialised)
    note_shared_access(w, in, lane, at, 2, false, nullptr);
  return *(u16*)(w.program->shared + at);
}

// operand[0..3] A in registers, or operand[0] its descriptor (flag & 1); operand[4] B's descriptor; operand[5]
// whether D counts; flag & 2: A, flag & 4: B lie across. vector: N.
H(multiply_in_group) {
  int columns = in.vector, first = 16 * (w.id & 3);
  auto number = [&](u16 x) { return in.type == TYPE_BF16 ? float_of_bf16(x) : float_of_fp16(x); };
  std::vector<float> a(16 * 16), b(16 * columns);
  if (in.flag & 1) {
    Operand left(source<u64>(w, in.operand[0])[0], in.flag & 2);
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 16; k++) a[r * 16 + k] = number(read_operand(w, in, left, first + r, k, r));
  } else {
    for (int v = 0; v < 4; v++)
      for (int i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) {
          int r = (i >> 2) + 8 * (v & 1), k = 2 * (i & 3) + half + 8 * (v >> 1);
          a[r * 16 + k] = number((u16)(source<u32>(w, in.operand[v])[i] >> (16 * half)));
        }
  }
  Operand right(source<u64>(w, in.operand[4])[0], in.flag & 4);
  for (int n = 0; n < columns; n++)
    for (int k = 0; k < 16; k++) b[k * columns + n] = number(read_operand(w, in, right, n, k, n & 31));
  bool counts = *source<u32>(w, in.operand[5]) & 1;
  for (size_t v = 0; v < in.accumulators.size(); v++) {
    float* d = destination<float>(w, in.accumulators[v]);
    for (int i = 0; i < 32; i++) {
      int r = (i >> 2) + 8 * ((v >> 1) & 1), n = 8 * (int)(v >> 2) + 2 * (i & 3) + (int)(v & 1);
      double sum = counts ? d[i] : 0.0;
      for (int k = 0; k < 16; k++) sum += (double)a[r * 16 + k] * b[k * columns + n];
      d[i] = (float)sum;
    }
  }
}
