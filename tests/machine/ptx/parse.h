// PTX text to statements: declarations, labels, operands. What a statement becomes stands in decode.h.
#pragma once

struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
static std::unordered_map<std::string, u8> TYPES = {
    {"pred", TYPE_PRED}, {"b8", TYPE_B8},   {"u8", TYPE_U8},       {"s8", TYPE_S8},         {"b16", TYPE_B16},
    {"u16", TYPE_U16},   {"s16", TYPE_S16}, {"f16", TYPE_F16},     {"bf16", TYPE_BF16},     {"b32", TYPE_B32},
    {"u32", TYPE_U32},   {"s32", TYPE_S32}, {"f32", TYPE_F32},     {"b64", TYPE_B64},       {"u64", TYPE_U64},
    {"s64", TYPE_S64},   {"f64", TYPE_F64}, {"f16x2", TYPE_F16X2}, {"bf16x2", TYPE_BF16X2}, {"tf32", TYPE_TF32},
    {"b128", TYPE_B128}};
static std::unordered_map<std::string, int> SPECIAL_REGISTERS = {
    {"%tid.x", SP_TIDX},       {"%tid.y", SP_TIDY},       {"%tid.z", SP_TIDZ},       {"%ntid.x", SP_NTIDX},
    {"%ntid.y", SP_NTIDY},     {"%ntid.z", SP_NTIDZ},     {"%ctaid.x", SP_CTAX},     {"%ctaid.y", SP_CTAY},
    {"%ctaid.z", SP_CTAZ},     {"%nctaid.x", SP_NCTAX},   {"%nctaid.y", SP_NCTAY},   {"%nctaid.z", SP_NCTAZ},
    {"%laneid", SP_LANE},      {"%warpid", SP_WARP},      {"%nwarpid", SP_NWARP},    {"%smid", SP_SMID},
    {"%nsmid", SP_NSMID},      {"%lanemask_lt", SP_LMLT}, {"%lanemask_le", SP_LMLE}, {"%lanemask_gt", SP_LMGT},
    {"%lanemask_ge", SP_LMGE}, {"%lanemask_eq", SP_LMEQ}};
static std::vector<std::string> split(const std::string& s, char c) {
  std::vector<std::string> r;
  std::string t;
  for (char x : s) {
    if (x == c) {
      r.push_back(t);
      t.clear();
    } else
      t += x;
  }
  r.push_back(t);
  return r;
}
static std::string trim(const std::string& s) {
  size_t a = s.find_first_not_of(" \t\n\r"), b = s.find_last_not_of(" \t\n\r");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

struct Parser {
  Kernel* kernel;
  const char* t;
  size_t p = 0, n;
  int line = 1;
  struct Decl {
    u8 type;
    int count;
  };
  struct Scope {
    std::map<std::string, Decl> decl;
    std::map<std::string, std::pair<s32, int>> registers;
  };
  std::vector<Scope> scopes;
  std::map<std::string, s32> labels;
  std::vector<std::pair<int, std::string>> fixups;
  std::map<std::string, u64> symbols;
  std::map<std::string, int> parameters;  // symbols: shared offsets (tag bit 63 for global memory)
  std::map<std::pair<u64, int>, s32> consts;
  std::vector<char> cdata;
  std::map<int, s32> specials;
  int src = -1;

  std::vector<std::pair<s32, bool>> touched;
  std::vector<std::vector<std::pair<s32, bool>>> touches;
  std::map<s32, int> widths;
  [[noreturn]] void die(const std::string& s) { throw ParseError("line " + std::to_string(line) + ": " + s); }
  s32 new_register(int width) {
    s32 o = (s32)kernel->register_file_bytes;
    widths[o] = width;
    kernel->register_file_bytes += width ? (size_t)width * 32 : 32;
    return o;
  }  // a predicate is a 32-bit mask (32 bytes kept for alignment)
  s32 constant(u64 v, int w) {
    if (w == 0) {
      v = v ? 0xffffffffu : 0;
    }
    auto key = std::make_pair(w == 1 ? v & 255 : w == 2 ? v & 0xffff : w == 4 ? v & 0xffffffffu : v, w);
    auto it = consts.find(key);
    if (it != consts.end()) return it->second;
    s32 o = (s32)cdata.size();
    int ww = w ? w : 1;
    cdata.resize(cdata.size() + (w ? 32 * ww : 32));
    if (!w) {
      u32 x = (u32)v;
      memcpy(&cdata[o], &x, 4);
    } else
      for (int i = 0; i < 32; i++) memcpy(&cdata[o + i * ww], &v, ww);
    return consts[key] = (s32)(o | 0x80000000u);
  }
  bool reg(const std::string& s, s32& off, int& width) {
    bool ok = find_register(s, off, width);
    if (ok) touched.push_back({off, false});
    return ok;
  }
  bool find_register(const std::string& s, s32& off, int& width) {
    for (int d = (int)scopes.size() - 1; d >= 0; d--) {
      auto& sc = scopes[d];
      auto it = sc.registers.find(s);
      if (it != sc.registers.end()) {
        off = it->second.first;
        width = it->second.second;
        return true;
      }
      size_t e = s.size();
      while (e > 0 && isdigit(s[e - 1])) e--;
      auto q = sc.decl.find(s);
      if (q == sc.decl.end()) {
        if (e == s.size()) continue;
        q = sc.decl.find(s.substr(0, e) + "<");  // of a numbered family, a0, a1, beside which an a may stand
        if (q == sc.decl.end() || atoi(s.c_str() + e) >= q->second.count) continue;
      }
      width = bytes_of(q->second.type);
      if (width == 1) width = 2;
      if (q->second.type == TYPE_PRED) width = 0;
      off = new_register(width);
      sc.registers[s] = {off, width};
      return true;
    }
    return false;
  }
  bool number(const std::string& s, u64& v) {
    if (s.empty()) return false;
    if (s[0] == '0' && s.size() == 10 && (s[1] == 'f' || s[1] == 'F')) {
      v = strtoull(s.c_str() + 2, nullptr, 16);
      return true;
    }
    if (s[0] == '0' && s.size() == 18 && (s[1] == 'd' || s[1] == 'D')) {
      v = strtoull(s.c_str() + 2, nullptr, 16);
      return true;
    }
    if (isdigit(s[0]) || ((s[0] == '-' || s[0] == '+') && s.size() > 1 && isdigit(s[1]))) {
      char* e;
      bool neg = s[0] == '-';
      v = strtoull(s.c_str() + (neg || s[0] == '+'), &e, 0);
      if (*e == 'U') e++;
      if (*e) return false;
      if (neg) v = (u64)0 - v;
      return true;
    }
    if (s == "true") {
      v = 1;
      return true;
    }
    if (s == "false") {
      v = 0;
      return true;
    }
    return false;
  }
  // operand of the given width (0: predicate); -1: any
  s32 operand(const std::string& s0, int w, bool dest = false, int* got = nullptr) {
    std::string s = trim(s0);
    s32 o;
    int ww;
    u64 v;
    if (s == "_") return NO_REGISTER;
    if (reg(s, o, ww)) {
      touched.back().second = dest;
      if (got) *got = ww;
      if (w >= 0 && ww != w)
        die("operand " + s + " is " + std::to_string(ww) + " bytes wide, expected " + std::to_string(w));
      return o;
    }
    auto sp = SPECIAL_REGISTERS.find(s);
    if (sp != SPECIAL_REGISTERS.end()) {
      if (got) *got = 4;
      auto it = specials.find(sp->second);
      if (it != specials.end()) {
        touched.push_back({it->second, false});
        return it->second;
      }
      o = new_register(4);
      touched.push_back({o, false});
      specials[sp->second] = o;
      kernel->specials.push_back({o, sp->second});
      return o;
    }
    if (dest) die("destination " + s);
    if (number(s, v)) {
      if (w < 0) die("immediate of unknown width " + s);
      if (got) *got = w;
      return constant(v, w);
    }
    size_t q = s.find('+');
    u64 add = 0;
    std::string base = s;
    if (q != std::string::npos) {
      base = trim(s.substr(0, q));
      if (!number(trim(s.substr(q + 1)), add)) die("operand " + s);
    }
    auto sy = symbols.find(base);
    if (sy != symbols.end()) {
      if (w < 0) w = 8;
      if (got) *got = w;
      return constant((sy->second & ~(1ull << 63)) + add, w);
    }
    die("operand " + s);
  }
  // [ reg + off ] -> base register (NO_REGISTER: absolute), offset; width of the register
  void address(const std::string& s0, s32& base, s64& off, u8& width, std::string* param = nullptr) {
    std::string s = trim(s0);
    if (s.empty() || s[0] != '[') die("address " + s);
    s = trim(s.substr(1, s.size() - 2));
    std::string b = s;
    off = 0;
    size_t q = s.find_last_of("+-");
    if (q != std::string::npos && q > 0 && (s[q] == '+' || s[q] == '-')) {
      size_t cut = q;
      if (s[q] == '-') {
        size_t r = s.find_last_not_of(" ", q - 1);
        if (r != std::string::npos && s[r] == '+') cut = r;
      }
      std::string num = trim(s.substr(cut + (s[cut] == '+' ? 1 : 0)));
      u64 v;
      num.erase(std::remove(num.begin(), num.end(), ' '), num.end());
      if (!number(num, v)) die("offset " + s);
      off = (s64)v;
      b = trim(s.substr(0, cut));
    }
    int w;
    u64 v;
    base = NO_REGISTER;
    width = 8;
    if (param) {
      *param = b;
      return;
    }
    if (reg(b, base, w)) {
      width = (u8)w;
      return;
    }
    auto sy = symbols.find(b);
    if (sy != symbols.end()) {
      off += (s64)(sy->second & ~(1ull << 63));
      return;
    }
    if (number(b, v)) {
      off += (s64)v;
      return;
    }
    die("address base " + b);
  }
  static std::vector<std::string> operands(const std::string& s) {
    std::vector<std::string> r;
    std::string t;
    int d = 0;
    for (char c : s) {
      if (c == '{' || c == '[' || c == '(') d++;
      if (c == '}' || c == ']' || c == ')') d--;
      if (c == ',' && !d) {
        r.push_back(trim(t));
        t.clear();
      } else
        t += c;
    }
    if (!trim(t).empty()) r.push_back(trim(t));
    return r;
  }
  static std::vector<std::string> vec(const std::string& s0) {
    std::string s = trim(s0);
    if (s.size() && s[0] == '{') {
      auto v = operands(s.substr(1, s.size() - 2));
      return v;
    }
    return {s};
  }

  void memory_flags(std::string& space, u8& type, int& vector) {
    space = "";
    type = TYPE_NONE;
    vector = 1;
    in.scope = 2;
    in.order = 0;
    for (size_t i = 1; i < parts.size(); i++) {
      const std::string& x = parts[i];
      if (x == "global" || x == "shared" || x == "param" || x == "local" || x == "const")
        space = x;
      else if (x == "shared::cta")
        space = "shared";
      else if (x == "v2")
        vector = 2;
      else if (x == "v4")
        vector = 4;
      else if (x == "v8")
        vector = 8;
      else if (x == "volatile")
        in.order |= ORDER_VOLATILE;
      else if (x == "relaxed")
        in.order |= ORDER_RELAXED;
      else if (x == "acquire")
        in.order |= ORDER_ACQUIRE;
      else if (x == "release")
        in.order |= ORDER_RELEASE;
      else if (x == "acq_rel")
        in.order |= ORDER_ACQUIRE | ORDER_RELEASE;
      else if (x == "cta")
        in.scope = 0;
      else if (x == "gpu")
        in.scope = 1;
      else if (x == "sys")
        in.scope = 2;
      else if (x == "cg" || x == "cv")
        in.order |= CACHE_GLOBAL;
      else if (x == "nc")
        in.order |= READ_ONLY;
      else if (x == "weak" || x == "ca" || x == "wb" || x == "cs" || x == "wt" || x == "lu" || x == "noftz" ||
               x.rfind("L1::", 0) == 0 || x.rfind("L2::", 0) == 0) {
      } else if (TYPES.count(x))
        type = TYPES[x];
      else if (x == "unified") {
      } else
        die("modifier " + x);
    }
  }
  void emit() {
    in.line = line0;
    in.source_line = src;
    kernel->code.push_back(in);
    touches.push_back(touched);
  }
  int line0 = 1;

  // The statement being decoded.
  Instruction in;
  std::string statement, op, rest;      // all of it, its opcode, its operands as text
  std::vector<std::string> parts, ops;  // the opcode between dots; the operands
  u8 last = TYPE_NONE;                  // the type that the opcode ends with

  bool has(const char* part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); }
  void need(size_t count) {
    if (ops.size() < count) die("operands of " + statement);
  }
  void decode(std::string text);
  void decode_exit();
  void decode_trap();
  void decode_branch();
  void decode_barrier();
  void decode_fence();
  void decode_hint();
  void decode_load();
  void decode_store();
  void decode_atomic();
  void decode_async_copy();
  void decode_load_matrix();
  void decode_matrix_product();
  void decode_store_matrix();
  void decode_group_product();
  void decode_shuffle();
  void decode_vote();
  void decode_active_mask();
  void decode_match();
  void decode_reduction();
  void decode_conversion();
  void decode_vector_move();
  void decode_clock();
  void decode_compare();
  void decode_plain();

  void skip_ws() {
    while (p < n) {
      char c = t[p];
      if (c == '\n')
        line++, p++;
      else if (c == ' ' || c == '\t' || c == '\r')
        p++;
      else if (c == '/' && p + 1 < n && t[p + 1] == '/') {
        while (p < n && t[p] != '\n') p++;
      } else if (c == '/' && p + 1 < n && t[p + 1] == '*') {
        while (p + 1 < n && !(t[p] == '*' && t[p + 1] == '/')) {
          if (t[p] == '\n') line++;
          p++;
        }
        p += 2;
      } else
        break;
    }
  }
  std::string until(const char* stops) {  // text up to one of `stops` at brace depth 0, comments dropped; the
                                          // stop is consumed
    std::string r;
    int d = 0;
    while (p < n) {
      char c = t[p];
      if (c == '/' && p + 1 < n && t[p + 1] == '/') {
        while (p < n && t[p] != '\n') p++;
        continue;
      }
      if (c == '{' || c == '(') d++;
      if (c == '}' || c == ')') d--;
      if (d <= 0 && strchr(stops, c) && !(c == '{' || c == '(')) {
        if (!(c == '}' && d < 0)) {
          p++;
          if (c == '\n') line++;
        }
        return r;
      }
      if (c == '\n') line++;
      r += c;
      p++;
    }
    return r;
  }
  void declare(const std::string& s) {  // .reg .b32 %r<10>, a, b;
    auto w = s.find('.', 1);
    std::string rest = trim(s.substr(w));
    size_t e = rest.find_first_of(" \t");
    std::string ty = rest.substr(1, e - 1);
    if (!TYPES.count(ty)) die("register type " + ty);
    for (auto& nm0 : operands(rest.substr(e))) {
      std::string nm = trim(nm0);
      size_t a = nm.find('<');
      if (a == std::string::npos) {
        scopes.back().decl[nm] = {TYPES[ty], -1};
        scopes.back().registers.erase(nm);
      } else {
        std::string base = nm.substr(0, a);
        scopes.back().decl[base + "<"] = {TYPES[ty], atoi(nm.c_str() + a + 1)};
        for (auto it = scopes.back().registers.begin(); it != scopes.back().registers.end();) {
          if (it->first.rfind(base, 0) == 0 && it->first.size() > base.size() &&
              isdigit(it->first[base.size()]))
            it = scopes.back().registers.erase(it);
          else
            ++it;
        }
      }
    }
  }
  void variable(const std::string& s) {  // .global/.shared declarations at module or function scope
    bool shared = s.find(".shared") != std::string::npos;
    size_t eq = s.find('=');
    std::string head = trim(eq == std::string::npos ? s : s.substr(0, eq));
    int align = 16;
    size_t al = head.find(".align");
    if (al != std::string::npos) align = atoi(head.c_str() + al + 6);
    size_t br = head.find('[');
    size_t end = br == std::string::npos ? head.size() : br;
    size_t st = head.find_last_of(" \t", end - 1);
    std::string nm = trim(head.substr(st + 1, end - st - 1));
    u8 ty = TYPE_B8;
    for (auto& tok : split(head, ' '))
      if (tok.size() > 1 && tok[0] == '.' && TYPES.count(tok.substr(1))) ty = TYPES[tok.substr(1)];
    size_t count = br == std::string::npos ? 1 : strtoull(head.c_str() + br + 1, nullptr, 0);
    size_t bytes = count * bytes_of(ty);
    if (shared) {
      if (head.find(".extern") != std::string::npos) {
        externs.push_back(nm);
        return;
      }
      kernel->static_shared = (kernel->static_shared + align - 1) / align * align;
      symbols[nm] = (u64)kernel->static_shared;
      kernel->static_shared += (int)bytes;
      return;
    }
    char* mem = (char*)aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(mem, 0, bytes + 1);
    if (eq != std::string::npos) {
      std::string init = trim(s.substr(eq + 1));
      size_t i = 0;
      for (auto& x : vec(init)) {
        u64 v;
        if (number(x, v)) memcpy(mem + i * bytes_of(ty), &v, bytes_of(ty));
        i++;
      }
    }
    kernel->globals.push_back({mem, bytes});
    symbols[nm] = (u64)mem | (1ull << 63);
  }
  std::vector<std::string> externs;
  void allocate();
  void run() {
    scopes.emplace_back();
    {
      std::string l;
      for (size_t i = 0; i <= n; i++) {
        if (i == n || t[i] == '\n') {
          if (kernel->text.empty()) kernel->text.push_back("");
          kernel->text.push_back(trim(l));
          l.clear();
        } else
          l += t[i];
      }
    }
    bool body = false;
    while (true) {
      skip_ws();
      if (p >= n) break;
      line0 = line;
      if (t[p] == '{') {
        p++;
        scopes.emplace_back();
        if (scopes.size() == 2 && !body) body = true;
        continue;
      }
      if (t[p] == '}') {
        p++;
        scopes.pop_back();
        if (body && scopes.size() == 1) break;
        continue;
      }
      if (t[p] == '.') {
        if (!strncmp(t + p, ".loc", 4)) {
          std::string r;
          while (p < n && t[p] != '\n') r += t[p++];
          size_t c = r.find("//");
          kernel->source_lines.push_back(c == std::string::npos ? r : trim(r.substr(c + 2)));
          src = (int)kernel->source_lines.size() - 1;
          continue;
        }
        if (!strncmp(t + p, ".version", 8) || !strncmp(t + p, ".target", 7) ||
            !strncmp(t + p, ".address_size", 13) || !strncmp(t + p, ".file", 5) ||
            !strncmp(t + p, ".reqntid", 8) || !strncmp(t + p, ".maxntid", 8) ||
            !strncmp(t + p, ".maxnreg", 8) || !strncmp(t + p, ".minnctapersm", 13)) {
          std::string r;
          while (p < n && t[p] != '\n') r += t[p++];
          if (r.rfind(".reqntid", 0) == 0 || r.rfind(".maxntid", 0) == 0) {
            auto v = operands(r.substr(8));
            for (size_t i = 0; i < v.size() && i < 3; i++) kernel->threads[i] = atoi(v[i].c_str());
          }
          continue;
        }
        if (!strncmp(t + p, ".section", 8)) {
          break;
        }
        if (!strncmp(t + p, ".visible .entry", 15) || !strncmp(t + p, ".entry", 6)) {
          std::string head;
          while (t[p] != '(') head += t[p++];
          p++;
          kernel->name = trim(head.substr(head.find(".entry") + 6));
          std::string ps;
          while (t[p] != ')') {
            if (t[p] == '\n') line++;
            ps += t[p++];
          }
          p++;
          int off = 0;
          for (auto& q : operands(ps)) {
            std::vector<std::string> tk;
            for (auto& x : split(q, ' '))
              if (trim(x).size()) tk.push_back(trim(x));
            u8 ty = TYPE_B8;
            int al = 0;
            for (size_t i = 0; i < tk.size(); i++) {
              if (tk[i] == ".align" && i + 1 < tk.size()) al = atoi(tk[i + 1].c_str());
              if (tk[i][0] == '.' && TYPES.count(tk[i].substr(1))) ty = TYPES[tk[i].substr(1)];
            }
            bool ptr = q.find(".ptr") != std::string::npos;
            std::string nm = tk.back();
            int cnt = 1;
            size_t br = nm.find('[');
            if (br != std::string::npos) {
              cnt = atoi(nm.c_str() + br + 1);
              nm = nm.substr(0, br);
            }
            int sz = bytes_of(ty) * cnt, a = br != std::string::npos && al ? al : bytes_of(ty);
            off = (off + a - 1) / a * a;
            parameters[nm] = off;
            kernel->parameters.push_back({nm, off, sz, ptr});
            off += sz;
          }
          kernel->parameter_bytes = off;
          continue;
        }
        std::string s = trim(until(";"));
        if (s.rfind(".reg", 0) == 0)
          declare(s);
        else if (s.find(".global") != std::string::npos || s.find(".shared") != std::string::npos ||
                 s.find(".const") != std::string::npos) {
          variable(s);
          if (externs.size()) {
            for (auto& x : externs) symbols[x] = (u64)((kernel->static_shared + 15) / 16 * 16);
          }
        } else if (s.rfind(".pragma", 0) == 0 || s.rfind(".extern .func", 0) == 0) {
        } else
          die("directive " + s);
        continue;
      }
      // label?
      size_t q = p;
      while (q < n && (isalnum(t[q]) || t[q] == '_' || t[q] == '$' || t[q] == '%')) q++;
      if (q < n && t[q] == ':' && q > p) {
        labels[std::string(t + p, q - p)] = (s32)kernel->code.size();
        p = q + 1;
        continue;
      }
      if (t[p] == ';') {
        p++;
        continue;
      }
      // an instruction may begin with a guard and hold braces
      std::string s;
      {
        int d = 0;
        while (p < n) {
          char c = t[p];
          if (c == '/' && p + 1 < n && t[p + 1] == '/') {
            while (p < n && t[p] != '\n') p++;
            continue;
          }
          if (c == '{') d++;
          if (c == '}') d--;
          if (c == ';' && d <= 0) {
            p++;
            break;
          }
          if (c == '\n') line++;
          s += c;
          p++;
        }
      }
      decode(s);
    }
    for (auto& f : fixups) {
      auto it = labels.find(f.second);
      if (it == labels.end()) die("label " + f.second);
      kernel->code[f.first].target = it->second;
    }
    Instruction end;
    for (auto& x : end.operand) x = NO_REGISTER;
    end.kind = KIND_EXIT;
    end.op_class = CLASS_BRANCH;
    end.handler = do_nothing;
    kernel->code.push_back(end);
    touches.emplace_back();
    allocate();
    kernel->constant_bytes = cdata.size() + 64;
    kernel->constants_base = (char*)aligned_alloc(64, (kernel->constant_bytes + 63) / 64 * 64);
    memcpy(kernel->constants_base, cdata.data(), cdata.size());
    kernel->register_file_bytes = (kernel->register_file_bytes + 63) / 64 * 64 + 64;
  }
};
