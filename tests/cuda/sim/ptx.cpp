#include "ptx.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <set>

namespace sim {

namespace {

const std::map<std::string, Type> kTypes = {
    {"b8", Type::u8_},   {"u8", Type::u8_},   {"s8", Type::s8_},   {"b16", Type::u16_}, {"u16", Type::u16_},
    {"s16", Type::s16_}, {"b32", Type::u32_}, {"u32", Type::u32_}, {"s32", Type::s32_}, {"b64", Type::u64_},
    {"u64", Type::u64_}, {"s64", Type::s64_}, {"pred", Type::pred}};

const std::map<std::string, Op> kOps = {
    {"mov", Op::mov},   {"ld", Op::ld},     {"st", Op::st},        {"add", Op::add},     {"sub", Op::sub},
    {"mul", Op::mul},   {"mad", Op::mad},   {"div", Op::div},      {"rem", Op::rem},     {"neg", Op::neg},
    {"abs", Op::abs},   {"min", Op::min},   {"max", Op::max},      {"and", Op::and_},    {"or", Op::or_},
    {"xor", Op::xor_},  {"not", Op::not_},  {"cnot", Op::cnot},    {"shl", Op::shl},     {"shr", Op::shr},
    {"shf", Op::shf_l}, {"prmt", Op::prmt}, {"bfe", Op::bfe},      {"bfi", Op::bfi},     {"popc", Op::popc},
    {"clz", Op::clz},   {"brev", Op::brev}, {"bfind", Op::bfind},  {"lop3", Op::lop3},   {"setp", Op::setp},
    {"selp", Op::selp}, {"cvt", Op::cvt},   {"cvta", Op::cvta},    {"bra", Op::bra},     {"ret", Op::ret},
    {"exit", Op::ret},  {"bar", Op::bar},   {"barrier", Op::bar},  {"shfl", Op::shfl},   {"vote", Op::vote},
    {"atom", Op::atom}, {"red", Op::red},   {"membar", Op::fence}, {"fence", Op::fence}, {"trap", Op::trap}};

// Modifiers that change nothing here: cache hints, scopes, what a type says already.
const std::vector<std::string> kHints = {"sync", "cs",      "cg",  "ca",  "lu",  "cv", "wb", "wt",     "nc",
                                         "uni",  "aligned", "cta", "gpu", "sys", "gl", "sc", "acq_rel"};

const std::map<std::string, Special> kSpecials = {
    {"%tid.x", Special::tid_x},       {"%tid.y", Special::tid_y},       {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},     {"%ntid.y", Special::ntid_y},     {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},   {"%ctaid.y", Special::ctaid_y},   {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x}, {"%nctaid.y", Special::nctaid_y}, {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},     {"%warpid", Special::warpid}};

template <typename Value>
bool lookup(const std::map<std::string, Value>& in, const std::string& key, Value& found) {
    auto at = in.find(key);
    if (at == in.end()) return false;
    found = at->second;
    return true;
}

struct Token {
    std::string text;
    int line;
};

bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

// Reads one kernel: its head from the name on, and its body.
class Reader {
  public:
    Reader(const std::string& text, size_t begin, int line) { split(text, begin, line); }

    Kernel read() {
        kernel_.name = take();
        parameters();
        while (!accept("{")) {
            if (accept(".maxntid")) {
                kernel_.threads_max = 1;
                do kernel_.threads_max *= static_cast<int>(number());
                while (accept(","));
            } else {
                take();
            }
        }
        for (int depth = 1; depth > 0;) {
            if (accept("}")) {
                --depth;
            } else if (accept("{")) {
                ++depth;
            } else {
                statement();
            }
        }
        for (Instruction& one : kernel_.code) {
            for (Operand& operand : one.operands) resolve(operand, one);
        }
        return std::move(kernel_);
    }

  private:
    void split(const std::string& text, size_t at, int line) {
        int depth = 0;
        bool opened = false;
        while (at < text.size() && !(opened && depth == 0)) {
            const char c = text[at];
            if (c == '\n') ++line;
            if (c == '/' && text[at + 1] == '/') {
                at = text.find('\n', at);
            } else if (std::isspace(static_cast<unsigned char>(c))) {
                ++at;
            } else if (is_word(c)) {
                size_t end = at;
                while (is_word(text[end]) || (text[end] == ':' && text[end + 1] == ':'))
                    end += text[end] == ':' ? 2 : 1;
                tokens_.push_back({text.substr(at, end - at), line});
                at = end;
            } else if (c == '"') {
                at = text.find('"', at + 1) + 1;
            } else {
                if (c == '{') opened = true, ++depth;
                if (c == '}') --depth;
                tokens_.push_back({std::string(1, c), line});
                ++at;
            }
        }
    }

    [[noreturn]] void refuse(const std::string& what) const {
        const Token& at = tokens_[std::min(next_, tokens_.size() - 1)];
        throw Fault("PTX line " + std::to_string(at.line) + " of " + kernel_.name + ": " + what);
    }

    const std::string& peek(size_t ahead = 0) const {
        if (next_ + ahead >= tokens_.size()) refuse("the text ends here");
        return tokens_[next_ + ahead].text;
    }

    std::string take() {
        std::string text = peek();
        ++next_;
        return text;
    }

    bool accept(const char* text) {
        if (peek() != text) return false;
        ++next_;
        return true;
    }

    void expect(const char* text) {
        if (!accept(text)) refuse(std::string("'") + text + "' was expected, not '" + peek() + "'");
    }

    static bool parse(std::string text, i64& value) {
        if (text.empty() || !std::isdigit(static_cast<unsigned char>(text[0]))) return false;
        if (text.back() == 'U') text.pop_back();
        char* end = nullptr;
        value = static_cast<i64>(std::strtoull(text.c_str(), &end, 0));
        return *end == 0;
    }

    i64 number() {
        const bool minus = accept("-");
        i64 value;
        if (!parse(peek(), value)) refuse("a number was expected, not '" + peek() + "'");
        ++next_;
        return minus ? -value : value;
    }

    Type type_token() {
        std::string text = take();
        Type type;
        if (text[0] != '.' || !lookup(kTypes, text.substr(1), type)) refuse("'" + text + "' is no type");
        return type;
    }

    // .align N .b8 name[M] behind .param, .shared or .local
    std::pair<std::string, Symbol> variable(Space space, u64& total) {
        u64 align = 0;
        if (accept(".align")) align = static_cast<u64>(number());
        const auto size = static_cast<u64>(size_of(type_token()));
        while (peek()[0] == '.') {  // .ptr .global .align N: what a pointer points at
            if (take() == ".align") number();
        }
        std::string name = take();
        u64 bytes = size;
        if (accept("[")) {
            bytes = size * static_cast<u64>(number());
            expect("]");
        }
        if (align == 0) align = size;
        total = (total + align - 1) / align * align;
        Symbol made{space, total, bytes};
        total += bytes;
        return {name, made};
    }

    void parameters() {
        if (!accept("(")) return;
        while (!accept(")")) {
            expect(".param");
            auto [name, symbol] = variable(Space::param, kernel_.parameter_bytes);
            kernel_.symbols[name] = symbol;
            kernel_.parameters.push_back(symbol);
            accept(",");
        }
    }

    int reg(const std::string& name) {
        auto [at, fresh] = registers_.try_emplace(name, kernel_.registers);
        if (fresh) ++kernel_.registers;
        return at->second;
    }

    void statement() {
        if (accept(".reg")) {
            for (std::string name; (name = take()) != ";";) {
                if (std::isalpha(static_cast<unsigned char>(name[0])))
                    named_.insert(name);  // inline assembly may call them what it likes
            }
        } else if (peek() == ".shared" || peek() == ".local") {
            const Space space = take() == ".shared" ? Space::shared : Space::local;
            auto [name, symbol] = variable(space, space == Space::shared ? kernel_.shared_bytes : kernel_.local_bytes);
            kernel_.symbols[name] = symbol;
            expect(";");
        } else if (accept(".pragma")) {
            while (!accept(";")) take();
        } else if (accept(".loc")) {
            const int line = tokens_[next_ - 1].line;
            while (tokens_[next_].line == line) ++next_;
        } else if (peek(1) == ":") {
            labels_[take()] = static_cast<int>(kernel_.code.size());
            expect(":");
        } else {
            instruction();
        }
    }

    static std::vector<std::string> parts_of(const std::string& text) {
        std::vector<std::string> parts;
        for (size_t begin = 0;;) {
            const size_t dot = text.find('.', begin);
            parts.push_back(text.substr(begin, dot == std::string::npos ? dot : dot - begin));
            if (dot == std::string::npos) return parts;
            begin = dot + 1;
        }
    }

    // Each modifier has to mean something to its operation; the rest is refused.
    void modifiers(Instruction& made, const std::string& full) {
        static const std::map<std::string, Space> spaces = {{"global", Space::global},
                                                            {"shared", Space::shared},
                                                            {"shared::cta", Space::shared},
                                                            {"local", Space::local},
                                                            {"param", Space::param}};
        static const std::map<std::string, Compare> compares = {
            {"eq", Compare::eq}, {"ne", Compare::ne}, {"lt", Compare::lt}, {"le", Compare::le}, {"gt", Compare::gt},
            {"ge", Compare::ge}, {"lo", Compare::lt}, {"ls", Compare::le}, {"hi", Compare::gt}, {"hs", Compare::ge}};
        static const std::map<std::string, Join> joins = {{"and", Join::and_}, {"or", Join::or_}, {"xor", Join::xor_}};
        static const std::map<std::string, Shuffle> shuffles = {
            {"up", Shuffle::up}, {"down", Shuffle::down}, {"bfly", Shuffle::bfly}, {"idx", Shuffle::idx}};
        static const std::map<std::string, Vote> votes = {
            {"ballot", Vote::ballot}, {"any", Vote::any}, {"all", Vote::all}, {"uni", Vote::uni}};
        static const std::map<std::string, Atomic> atomics = {
            {"add", Atomic::add}, {"and", Atomic::and_}, {"or", Atomic::or_},    {"xor", Atomic::xor_},
            {"min", Atomic::min}, {"max", Atomic::max},  {"exch", Atomic::exch}, {"cas", Atomic::cas}};
        const auto parts = parts_of(full);
        bool has_variant = false;
        auto vary = [&](const auto& table, const std::string& part) {
            auto at = table.find(part);
            if (at == table.end() || has_variant) return false;
            made.variant = static_cast<u8>(at->second);
            return has_variant = true;
        };
        for (size_t i = 1; i < parts.size(); ++i) {
            const std::string& part = parts[i];
            Type type;
            if (lookup(kTypes, part, type)) {
                (made.type == Type::none ? made.type : made.from) = type;
            } else if (made.op == Op::setp && vary(compares, part)) {
            } else if (made.op == Op::setp && lookup(joins, part, made.join)) {
            } else if (made.op == Op::shfl && vary(shuffles, part)) {
            } else if (made.op == Op::vote && vary(votes, part)) {
            } else if ((made.op == Op::atom || made.op == Op::red) && vary(atomics, part)) {
            } else if (lookup(spaces, part, made.space)) {
            } else if (made.op == Op::cvta && part == "to") {
                made.to = true;
            } else if (part == "lo" && (made.op == Op::mul || made.op == Op::mad)) {
            } else if (part == "hi" && (made.op == Op::mul || made.op == Op::mad)) {
                made.op = made.op == Op::mul ? Op::mul_hi : Op::mad_hi;
            } else if (part == "wide" && (made.op == Op::mul || made.op == Op::mad)) {
                made.op = made.op == Op::mul ? Op::mul_wide : Op::mad_wide;
            } else if (made.op == Op::shf_l && (part == "l" || part == "r")) {
                if (part == "r") made.op = Op::shf_r;
            } else if ((made.op == Op::shf_l || made.op == Op::shf_r) && (part == "wrap" || part == "clamp")) {
                made.clamped = part == "clamp";
            } else if (made.op == Op::bar && part == "warp") {
                made.op = Op::bar_warp;
            } else if ((made.op == Op::ld || made.op == Op::st) && (part == "v2" || part == "v4")) {
                made.width = static_cast<u8>(part[1] - '0');
            } else if (part == "volatile" || part == "relaxed" || part == "acquire" || part == "release") {
                made.volatile_ = true;
            } else if (std::find(kHints.begin(), kHints.end(), part) == kHints.end()) {
                refuse("'." + part + "' of '" + full + "' is not known");
            }
        }
        const bool needs = made.op == Op::setp || made.op == Op::shfl || made.op == Op::vote || made.op == Op::atom ||
                           made.op == Op::red;
        if (needs && !has_variant) refuse("'" + full + "' says not what it does");
        if (made.op == Op::bar && full != "bar.sync" && full != "barrier.sync" && full != "barrier.sync.aligned") {
            refuse("'" + full + "' is not known");
        }
        if (made.from == Type::none) made.from = made.type;
    }

    void instruction() {
        Instruction made{};
        made.line = tokens_[next_].line;
        if (accept("@")) {
            made.guard_negated = accept("!");
            made.guard = reg(take());
        }
        const std::string full = take();
        if (!lookup(kOps, parts_of(full)[0], made.op)) refuse("'" + full + "' is not known");
        modifiers(made, full);
        if (!accept(";")) {
            do {
                made.operands.push_back(operand());
                if (accept("|")) made.operands.back().parts.push_back(operand());
            } while (accept(","));
            expect(";");
        }
        kernel_.code.push_back(std::move(made));
    }

    Operand operand() {
        Operand made;
        if (accept("{")) {
            made.is = Operand::Is::vector;
            do made.parts.push_back(operand());
            while (accept(","));
            expect("}");
        } else if (accept("[")) {
            made.is = Operand::Is::address;
            if (peek()[0] == '%') {
                made.reg = reg(take());
            } else if (!parse(peek(), made.value)) {
                made.symbol = take();
            } else {
                take();
            }
            if (accept("+") || peek() == "-") made.value += number();
            expect("]");
        } else if (accept("!")) {
            made = operand();
            made.negated = true;
        } else if (Special special; lookup(kSpecials, peek(), special)) {
            made.is = Operand::Is::special;
            made.value = static_cast<i64>(special);
            take();
        } else if (peek()[0] == '%' || named_.count(peek()) != 0) {
            if (peek().find('.') != std::string::npos) refuse("the register '" + peek() + "' is not known");
            made.is = Operand::Is::reg;
            made.reg = reg(take());
        } else if (accept("_")) {
        } else if (i64 value; peek() == "-" || parse(peek(), value)) {
            made.is = Operand::Is::constant;
            made.value = number();
        } else {
            made.symbol = take();
        }
        return made;
    }

    void resolve(Operand& operand, Instruction& of) {
        for (Operand& part : operand.parts) resolve(part, of);
        if (operand.symbol.empty()) return;
        if (of.op == Op::bra) {
            if (!lookup(labels_, operand.symbol, of.target)) throw Fault("there is no label " + operand.symbol);
            return;
        }
        Symbol symbol;
        if (!lookup(kernel_.symbols, operand.symbol, symbol)) {
            throw Fault("PTX line " + std::to_string(of.line) + " of " + kernel_.name + ": the symbol '" +
                        operand.symbol + "' is not known");
        }
        operand.value += static_cast<i64>(symbol.offset + (symbol.space == Space::shared ? kSharedStart : 0));
        if (operand.is == Operand::Is::nothing) operand.is = Operand::Is::constant;
    }

    std::vector<Token> tokens_;
    size_t next_ = 0;
    Kernel kernel_;
    std::map<std::string, int> registers_, labels_;
    std::set<std::string> named_;
};

}  // namespace

int size_of(Type type) {
    switch (type) {
        case Type::u8_:
        case Type::s8_:
        case Type::pred:
            return 1;
        case Type::u16_:
        case Type::s16_:
            return 2;
        case Type::u32_:
        case Type::s32_:
            return 4;
        default:
            return 8;
    }
}

bool is_signed(Type type) {
    return type >= Type::s8_ && type <= Type::s64_;
}

const char* name_of(Op op) {
    for (const auto& [name, value] : kOps) {
        if (value == op) return name.c_str();
    }
    return "variant";
}

Module::Module(std::string text) : text_(std::move(text)) {
    for (size_t at = 0; (at = text_.find(".entry", at)) != std::string::npos;) {
        at = text_.find_first_not_of(" \t", at + 6);
        const size_t end = text_.find_first_of(" \t(\n", at);
        begins_[text_.substr(at, end - at)] = at;
    }
}

std::vector<std::string> Module::kernels() const {
    std::vector<std::string> names;
    for (const auto& [name, begin] : begins_) names.push_back(name);
    return names;
}

const Kernel& Module::kernel(const std::string& name) {
    auto found = read_.find(name);
    if (found != read_.end()) return found->second;
    auto begin = begins_.find(name);
    if (begin == begins_.end()) throw Fault("there is no kernel '" + name + "'");
    const auto line = 1 + std::count(text_.begin(), text_.begin() + static_cast<long>(begin->second), '\n');
    return read_[name] = Reader(text_, begin->second, static_cast<int>(line)).read();
}

}  // namespace sim
