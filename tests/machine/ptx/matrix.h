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
