// Bi-WKV on a CPU, forward and backward. Built by native.py at first use; a plain C interface, no headers but the system's.
//
// With x = (e^k v, e^k), lam = e^-w, and the sums before and behind each token
//
//     P_{t+1} = lam P_t + x_t,    S_{t-1} = lam S_t + x_t,    z_t = P_t + S_t + e^u x_t,    y = z_num / z_den,
//
// a task is one sample and a strand of neighbouring channels, whose sums are in registers. Tokens come in chunks, and a task
// walks over them a few times: for the largest key; for the weights e^k and their sums within each chunk, which are then
// carried from chunk to chunk; for the results, after a look back from the end of the chunk to its start. Beyond the results,
// the forward pass needs memory for a strand's weights, the backward pass three times as much.
//
// Sums within a chunk are of the type A, and are carried from chunk to chunk in double. So a rounded lam is never raised to
// high powers, and accuracy does not depend on the number of tokens.
//
// Each channel's numbers are computed in the same order whoever does it, and the gradients of w and u are summed over samples
// at the end: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

using std::int64_t;

#ifdef __AVX512F__
constexpr int BYTES = 64;  // of a vector
#else
constexpr int BYTES = 32;
#endif
constexpr int LANES = BYTES / sizeof(float);
constexpr int GROUP = 4;      // vectors of channels in a strand
constexpr int CHUNK = 32;     // tokens
constexpr int64_t AHEAD = 8;  // tokens fetched before they are needed

// ---------------------------------------------------------------------------------------------------- numbers

struct BFloat16 {
    std::uint16_t bits;
};

template <typename T>
struct Stored {
    using type = T;
};
template <>
struct Stored<BFloat16> {
    using type = std::uint16_t;
};

template <typename T, int COUNT>
struct Several {
    typedef typename Stored<T>::type type __attribute__((vector_size(sizeof(T) * COUNT)));
};
template <typename T, int COUNT>
using VecOf = typename Several<T, COUNT>::type;

template <typename A>
constexpr int lanes = BYTES / static_cast<int>(sizeof(A));
template <typename A>
using Vec = VecOf<A, lanes<A>>;

template <typename To, typename From>
INLINE To bits_of(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a value is looked at as another of its size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename A, typename T>
INLINE Vec<A> load(const T* from) {
    constexpr int count = lanes<A>;
    VecOf<T, count> found;
    std::memcpy(&found, from, sizeof found);
    if constexpr (std::is_same_v<T, BFloat16>) {
        const auto bits = __builtin_convertvector(found, VecOf<std::uint32_t, count>) << 16;
        return __builtin_convertvector(bits_of<VecOf<float, count>>(bits), Vec<A>);
    } else {
        return __builtin_convertvector(found, Vec<A>);
    }
}

template <typename A, typename T>
INLINE void store(T* to, Vec<A> value) {
    constexpr int count = lanes<A>;
    VecOf<T, count> given;
    if constexpr (std::is_same_v<T, BFloat16>) {  // to nearest, ties to even
        using Bits = VecOf<std::uint32_t, count>;
        const auto single = __builtin_convertvector(value, VecOf<float, count>);
        const Bits bits = bits_of<Bits>(single);
        const Bits is_nan = bits_of<Bits>(single != single);
        const Bits near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        given = __builtin_convertvector((near & ~is_nan) | (0x7fc0 & is_nan), VecOf<T, count>);
    } else {
        given = __builtin_convertvector(value, VecOf<T, count>);
    }
    std::memcpy(to, &given, sizeof given);
}

template <typename A>
INLINE Vec<A> fill(double value) {
    return Vec<A>{} + static_cast<A>(value);
}

// a b + c, rounded once where the processor can.
template <typename V>
INLINE V fma(V a, V b, V c) {
    return a * b + c;
}

// e^x for x <= 0, one for one lane: 2^n e^r with |r| <= log(2) / 2. Relative error 1e-7, of doubles 1e-15. NaN stays NaN.
INLINE Vec<float> exponential(Vec<float> x) {
    const auto all = fill<float>;
    const Vec<float> shift = all(12582912.0);  // 1.5 2^23: a sum with it has n in its lowest bits
    const Vec<float> shifted = fma(x, all(1.44269504), shift);
    const Vec<float> r = fma(shift - shifted, all(0.693147181), x);
    Vec<float> p = fma(all(0.00138367422), r, all(0.00837489836));
    p = fma(p, r, all(0.0416682318));
    p = fma(p, r, all(0.166664192));
    p = fma(p, r, all(0.49999992));
    p = fma(p, r, all(1.00000004));
    p = fma(p, r, all(1.0));
    using I = VecOf<std::int32_t, lanes<float>>;
    const I scaled = bits_of<I>(p) + (bits_of<I>(shifted) << 23);
    return bits_of<Vec<float>>(scaled & ~(I)(x < -87.0f));
}
INLINE Vec<double> exponential(Vec<double> x) {
    const auto all = fill<double>;
    const Vec<double> shift = all(6755399441055744.0);  // 1.5 2^52
    const Vec<double> shifted = fma(x, all(1.4426950408889634), shift);
    const Vec<double> n = shift - shifted;
    const Vec<double> r = fma(n, all(1.90821492927058770e-10), fma(n, all(0.693147180369123816), x));
    Vec<double> p = fma(all(2.0831937028330770e-9), r, all(2.5114726046007716e-8));
    p = fma(p, r, all(2.7557575103968663e-7));
    p = fma(p, r, all(2.7557225470739187e-6));
    p = fma(p, r, all(2.4801586913291740e-5));
    p = fma(p, r, all(1.9841269908555709e-4));
    p = fma(p, r, all(1.3888888889143864e-3));
    p = fma(p, r, all(8.3333333333098987e-3));
    p = fma(p, r, all(4.1666666666665927e-2));
    p = fma(p, r, all(1.6666666666666702e-1));
    p = fma(p, r, all(5.0000000000000001e-1));
    p = fma(p, r, all(1.0));
    p = fma(p, r, all(1.0));
    using I = VecOf<std::int64_t, lanes<double>>;
    const I scaled = bits_of<I>(p) + (bits_of<I>(shifted) << 52);
    return bits_of<Vec<double>>(scaled & ~(I)(x < -708.0));
}

// ---------------------------------------------------------------------------------------------------- one strand

constexpr double LARGEST = 300.0;  // as in rates.py
constexpr double SAFE_IN_FLOAT = 20.0;

template <typename T>
struct Rows {  // of tokens; neighbouring channels are neighbours in memory
    T* start;
    int64_t stride;

    INLINE T* at(int64_t token, int64_t channel = 0) const { return start + token * stride + channel; }
};

// What a strand reads and writes; y in the forward pass, gy, gk, gv in the backward pass. K is the type in memory.
template <typename K>
struct Columns {
    Rows<const K> k, v, gy;
    Rows<K> y, gk, gv;
};

// Numerators and denominators of sums of x, or of sums of g = (g', g' y), where g' = gy / z_den.
template <typename A, int N>
struct Pair {
    Vec<A> num[N], den[N];
};

template <typename A>
using Number __attribute__((may_alias)) = A;  // in a vector

// Sums that go from chunk to chunk, in double. Loops over single numbers: compilers make vectors of those that they have.
template <typename A, int N>
struct Carry {
    static constexpr int COUNT = 2 * N * lanes<A>;
    double sums[COUNT] = {};

    // Take what a chunk adds, give what enters it.
    INLINE void pass(Pair<A, N>& sum, const double* far) {
        Number<A>* const numbers = reinterpret_cast<Number<A>*>(&sum);
        for (int i = 0; i < COUNT; ++i) {
            const double own = numbers[i];
            numbers[i] = static_cast<A>(sums[i]);
            sums[i] = sums[i] * far[i] + own;
        }
    }
    // The two halves of this.
    INLINE void give(Pair<A, N>& entering) const {
        Number<A>* const numbers = reinterpret_cast<Number<A>*>(&entering);
        for (int i = 0; i < COUNT; ++i) numbers[i] = static_cast<A>(sums[i]);
    }
    INLINE void take(const Pair<A, N>& own, const double* far) {
        const Number<A>* const numbers = reinterpret_cast<const Number<A>*>(&own);
        for (int i = 0; i < COUNT; ++i) sums[i] = sums[i] * far[i] + numbers[i];
    }
};

// Unrolled loops over vectors, whose sums are to stay in registers: the body sees its index as a constant.
template <typename Body, int... I>
INLINE void unroll(Body&& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, typename Body>
INLINE void unroll(Body&& body) {
    unroll(body, std::make_integer_sequence<int, COUNT>{});
}
#define FOR_EACH(i, count) unroll<count>([&](auto i) __attribute__((always_inline))

// N vectors of channels of one sample, accumulated in A. Its methods are called chunk by chunk.
template <typename K, typename A, int N>
class Strand {
    using V = Vec<A>;
    using Two = Pair<A, N>;
    static constexpr int WIDTH = N * lanes<A>;
    static constexpr int SOME = N < 2 ? N : 2;  // vectors whose sums fit into registers, where there are many

    int64_t tokens, chunks;
    struct Memory : Columns<K> {
        Two* g;     // of each token
        V* weight;  // e^k of each token
    } memory;
    V largest[N], lam[N], bonus[N];
    V fade[CHUNK][N];  // lam^p
    double far[2 * WIDTH];  // lam^CHUNK, for numerators and denominators
    Two *x_before, *x_behind, *g_before, *g_behind;  // what enters each chunk
    Carry<A, N> g_carry;
    double gw[WIDTH] = {}, gu[WIDTH] = {};

public:
    // Bytes beside this object; the backward pass needs more.
    static int64_t scratch(int64_t tokens, bool backward) {
        const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
        const int64_t pairs = backward ? 4 * chunks + tokens : 2 * chunks;
        return pairs * sizeof(Two) + tokens * N * sizeof(V);
    }

    void begin(int64_t all, const Columns<K>& given, const double* w, const double* u, bool backward, void* scratch) {
        tokens = all;
        chunks = (tokens + CHUNK - 1) / CHUNK;
        x_before = static_cast<Two*>(scratch);
        x_behind = x_before + chunks;
        g_before = x_behind + chunks;
        g_behind = g_before + chunks;
        Two* const g = g_behind + chunks;
        V* const weight = reinterpret_cast<V*>(backward ? g + tokens : g_before);
        memory = {given, g, weight};
        for (V& key : largest) key = fill<A>(std::numeric_limits<A>::lowest());
        double exact[WIDTH], power[WIDTH];
        for (int c = 0; c < WIDTH; ++c) {
            exact[c] = std::exp(-w[c]);
            power[c] = std::exp(u[c]);
        }
        narrow(bonus, power);
        narrow(lam, exact);
        std::fill(power, power + WIDTH, 1.0);
        for (int p = 0; p < CHUNK; ++p) {
            narrow(fade[p], power);
            for (int c = 0; c < WIDTH; ++c) power[c] *= exact[c];
        }
        std::copy(power, power + WIDTH, far);
        std::copy(power, power + WIDTH, far + WIDTH);
    }

    // First walk: the largest key.
    void look(int64_t chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = length_of(chunk);
        const Memory at = memory;
        V most[N];
        std::copy(largest, largest + N, most);
        for (int p = 0; p < length; ++p) {
            FOR_EACH(i, N) {
                const V key = load<A>(at.k.at(start + p, i * lanes<A>));
                most[i] = key > most[i] ? key : most[i];
            });
        }
        std::copy(most, most + N, largest);
    }

    // Second walk: weights and their sums within the chunk.
    void weigh(int64_t chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = length_of(chunk);
        const Memory at = memory;
        for (int p = 0; p < length; ++p) {
            const int64_t t = start + p;
            fetch(at.v, t + AHEAD);
            FOR_EACH(i, N) {
                at.weight[t * N + i] = exponential(load<A>(at.k.at(t, i * lanes<A>)) - largest[i]);
            });
        }
        for (int first = 0; first < N; first += SOME) {
            Pair<A, SOME> forth{}, back{};
            for (int p = 0; p < length; ++p) {
                for (int j = 0; j < SOME; ++j) {
                    const int i = first + j;
                    V num, den;
                    term(at, start + p, i, num, den);
                    forth.num[j] = fma(forth.num[j], lam[i], num);
                    forth.den[j] = fma(forth.den[j], lam[i], den);
                    back.num[j] = fma(fade[p][i], num, back.num[j]);
                    back.den[j] = fma(fade[p][i], den, back.den[j]);
                }
            }
            for (int j = 0; j < SOME; ++j) {
                const int i = first + j;
                x_before[chunk].num[i] = forth.num[j];
                x_before[chunk].den[i] = forth.den[j];
                x_behind[chunk].num[i] = back.num[j];
                x_behind[chunk].den[i] = back.den[j];
            }
        }
    }

    // After it: what enters each chunk.
    void enter() {
        Carry<A, N> forth, back;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) forth.pass(x_before[chunk], far);
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) back.pass(x_behind[chunk], far);
    }

    // Third walk of the forward pass: y.
    void answer(int64_t chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = length_of(chunk);
        const Memory at = memory;
        Two behind[CHUNK];
        look_behind(chunk, behind);
        Two before = x_before[chunk];
        for (int p = 0; p < length; ++p) {
            FOR_EACH(i, N) {
                V x_num, x_den;
                term(at, start + p, i, x_num, x_den);
                const V num = fma(bonus[i], x_num, before.num[i] + behind[p].num[i]);
                const V den = fma(bonus[i], x_den, before.den[i] + behind[p].den[i]);
                store<A>(at.y.at(start + p, i * lanes<A>), num / den);
                advance(before, i, x_num, x_den);
            });
        }
    }

    // Third walk of the backward pass: g, its sums within the chunk, all of gu, and half of gw.
    void scale(int64_t chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = length_of(chunk);
        const Memory at = memory;
        Two behind[CHUNK];
        look_behind(chunk, behind);
        Two before = x_before[chunk];
        for (int p = 0; p < length; ++p) {
            const int64_t t = start + p;
            fetch(at.gy, t + AHEAD);
            FOR_EACH(i, N) {
                V x_num, x_den;
                term(at, t, i, x_num, x_den);
                const V num = fma(bonus[i], x_num, before.num[i] + behind[p].num[i]);
                const V inverse = 1 / (fma(bonus[i], x_den, before.den[i] + behind[p].den[i]));
                const V scaled = load<A>(at.gy.at(t, i * lanes<A>)) * inverse;
                at.g[t].num[i] = scaled;
                at.g[t].den[i] = scaled * (num * inverse);
                advance(before, i, x_num, x_den);
            });
        }
        g_carry.give(g_before[chunk]);
        FOR_EACH(i, N) {
            V gw_part{}, gu_part{}, forth_num{}, forth_den{}, back_num{}, back_den{};
            V near_num = g_before[chunk].num[i], near_den = g_before[chunk].den[i];
            for (int p = 0; p < length; ++p) {
                const int64_t t = start + p;
                V x_num, x_den;
                term(at, t, i, x_num, x_den);
                const V num = at.g[t].num[i], den = at.g[t].den[i];
                gu_part += num * x_num - den * x_den;
                gw_part += near_num * behind[p].num[i] - near_den * behind[p].den[i];
                near_num = fma(near_num, lam[i], num);
                near_den = fma(near_den, lam[i], den);
                forth_num = fma(forth_num, lam[i], num);
                forth_den = fma(forth_den, lam[i], den);
                back_num = fma(fade[p][i], num, back_num);
                back_den = fma(fade[p][i], den, back_den);
            }
            g_behind[chunk].num[i] = forth_num;
            g_behind[chunk].den[i] = forth_den;
            behind[0].num[i] = back_num;
            behind[0].den[i] = back_den;
            add(gw, i, gw_part);
            add(gu, i, gu_part);
        });
        g_carry.take(g_behind[chunk], far);
        g_behind[chunk] = behind[0];
    }

    // After it: what enters each chunk from behind.
    void turn() {
        Carry<A, N> back;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) back.pass(g_behind[chunk], far);
    }

    // Fourth walk: the gradients of k and v, and the other half of gw.
    void finish(int64_t chunk) {
        const int64_t start = chunk * CHUNK;
        const int length = length_of(chunk);
        const Memory at = memory;
        for (int first = 0; first < N; first += SOME) {
            struct {
                V x_num, x_den, q_num, q_den;
            } kept[CHUNK][SOME];
            Pair<A, SOME> x_near, g_near, g_far;
            for (int j = 0; j < SOME; ++j) {
                const int i = first + j;
                x_near.num[j] = x_before[chunk].num[i];
                x_near.den[j] = x_before[chunk].den[i];
                g_near.num[j] = g_before[chunk].num[i];
                g_near.den[j] = g_before[chunk].den[i];
                g_far.num[j] = g_behind[chunk].num[i];
                g_far.den[j] = g_behind[chunk].den[i];
            }
            for (int p = 0; p < length; ++p) {
                const int64_t t = start + p;
                for (int j = 0; j < SOME; ++j) {
                    const int i = first + j;
                    V x_num, x_den;
                    term(at, t, i, x_num, x_den);
                    const V g_num = at.g[t].num[i], g_den = at.g[t].den[i];
                    kept[p][j].x_num = x_near.num[j];
                    kept[p][j].x_den = x_near.den[j];
                    kept[p][j].q_num = fma(bonus[i], g_num, g_near.num[j]);
                    kept[p][j].q_den = fma(bonus[i], g_den, g_near.den[j]);
                    x_near.num[j] = fma(x_near.num[j], lam[i], x_num);
                    x_near.den[j] = fma(x_near.den[j], lam[i], x_den);
                    g_near.num[j] = fma(g_near.num[j], lam[i], g_num);
                    g_near.den[j] = fma(g_near.den[j], lam[i], g_den);
                }
            }
            V gw_part[SOME] = {};
            for (int p = length - 1; p >= 0; --p) {
                const int64_t t = start + p;
                for (int j = 0; j < SOME; ++j) {
                    const int i = first + j;
                    const V q_num = kept[p][j].q_num + g_far.num[j];
                    const V q_den = kept[p][j].q_den + g_far.den[j];
                    gw_part[j] += g_far.num[j] * kept[p][j].x_num - g_far.den[j] * kept[p][j].x_den;
                    g_far.num[j] = fma(g_far.num[j], lam[i], at.g[t].num[i]);
                    g_far.den[j] = fma(g_far.den[j], lam[i], at.g[t].den[i]);
                    const V den = at.weight[t * N + i];
                    const V v = load<A>(at.v.at(t, i * lanes<A>));
                    store<A>(at.gv.at(t, i * lanes<A>), den * q_num);
                    store<A>(at.gk.at(t, i * lanes<A>), den * (v * q_num - q_den));
                }
            }
            for (int j = 0; j < SOME; ++j) { add(gw, first + j, gw_part[j]); }
        }
    }

    // What belongs to -gw / lam and to gu / e^u.
    void give(double* gw_channels, double* gu_channels) const {
        std::memcpy(gw_channels, gw, sizeof gw);
        std::memcpy(gu_channels, gu, sizeof gu);
    }

private:
    INLINE int length_of(int64_t chunk) const {
        return static_cast<int>(std::min<int64_t>(CHUNK, tokens - chunk * CHUNK));
    }

    INLINE void fetch(const Rows<const K>& rows, int64_t token) const {
        if (token >= tokens) return;
        constexpr int line = 64 / sizeof(K);
        for (int channel = 0; channel < WIDTH; channel += line) __builtin_prefetch(rows.at(token, channel));
    }

    static INLINE void term(const Memory& at, int64_t t, int i, V& num, V& den) {
        den = at.weight[t * N + i];
        num = den * load<A>(at.v.at(t, i * lanes<A>));
    }

    INLINE void advance(Two& sum, int i, const V& num, const V& den) const {
        sum.num[i] = fma(sum.num[i], lam[i], num);
        sum.den[i] = fma(sum.den[i], lam[i], den);
    }

    // The sums behind each token of a chunk.
    INLINE void look_behind(int64_t chunk, Two* behind) const {
        const Memory at = memory;
        Two sum = x_behind[chunk];
        for (int p = length_of(chunk) - 1; p >= 0; --p) {
            FOR_EACH(i, N) {
                V num, den;
                term(at, chunk * CHUNK + p, i, num, den);
                behind[p].num[i] = sum.num[i];
                behind[p].den[i] = sum.den[i];
                advance(sum, i, num, den);
            });
        }
    }

    static INLINE void add(double* sums, int i, const V& value) {
        const Number<A>* const numbers = reinterpret_cast<const Number<A>*>(&value);
        for (int lane = 0; lane < lanes<A>; ++lane) sums[i * lanes<A> + lane] += numbers[lane];
    }

    static void narrow(V* values, const double* numbers) {
        A given[WIDTH];
        for (int c = 0; c < WIDTH; ++c) given[c] = static_cast<A>(numbers[c]);
        std::memcpy(values, given, sizeof given);
    }
};

#undef FOR_EACH

// ---------------------------------------------------------------------------------------------------- all of them

struct Tensor {  // (B, T, C), channels next to each other
    void* start;
    int64_t batch_stride, token_stride;  // in elements

    template <typename K>
    Rows<K> rows(int64_t sample, int64_t channel) const {
        return {static_cast<K*>(start) + sample * batch_stride + channel, token_stride};
    }
};

struct Problem {
    int64_t batch, tokens, channels;
    bool backward;
    Tensor k, v, y, gy, gk, gv;
    int64_t padded;    // channels, filled up with zeros to whole groups
    double *w, *u;     // per channel
    double *gw, *gu;   // per sample and channel
};

template <typename K, typename A, int N>
void walk(const Problem& problem, int64_t sample, int64_t channel, const Columns<K>& columns, char* memory) {
    Strand<K, A, N> strand;
    strand.begin(problem.tokens, columns, problem.w + channel, problem.u + channel, problem.backward, memory);
    const int64_t chunks = (problem.tokens + CHUNK - 1) / CHUNK;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) strand.look(chunk);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) strand.weigh(chunk);
    strand.enter();
    if (!problem.backward) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) strand.answer(chunk);
        return;
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) strand.scale(chunk);
    strand.turn();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) strand.finish(chunk);
    const int64_t place = sample * problem.padded + channel;
    strand.give(problem.gw + place, problem.gu + place);
}

struct Piece {  // of the channels
    int64_t channel;
    bool whole;  // a strand, else a vector or what is left of one
    bool wide;   // accumulate in double
};

INLINE double widened(double value) { return value; }
INLINE float widened(float value) { return value; }
INLINE float widened(BFloat16 value) { return bits_of<float>(static_cast<std::uint32_t>(value.bits) << 16); }

template <typename K>
INLINE K narrowed(double value) {
    if constexpr (std::is_same_v<K, BFloat16>) {
        const std::uint32_t bits = bits_of<std::uint32_t>(static_cast<float>(value));
        const std::uint32_t near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return {static_cast<std::uint16_t>(value != value ? 0x7fc0 : near)};
    } else {
        return static_cast<K>(value);
    }
}

// Copies of a few channels of a sample, in the type in which they are computed.
template <typename A>
class Packed {
    A* memory;
    int64_t tokens, channels;

    A* slot(int number) const { return memory + number * tokens * LANES; }

public:
    static int64_t size(int64_t tokens) { return 6 * tokens * LANES * static_cast<int64_t>(sizeof(A)); }

    Packed(void* memory, int64_t tokens, int64_t channels)
        : memory(static_cast<A*>(memory)), tokens(tokens), channels(channels) {}

    template <typename K>
    Rows<const A> take(const Rows<const K>& rows, int number) const {
        std::fill(slot(number), slot(number) + tokens * LANES, A{});
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t c = 0; c < channels; ++c) slot(number)[t * LANES + c] = widened(rows.at(t)[c]);
        }
        return room<const A>(number);
    }
    template <typename T = A>
    Rows<T> room(int number) const {
        return {slot(number), LANES};
    }
    template <typename K>
    void give(const Rows<K>& rows, int number) const {
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t c = 0; c < channels; ++c) rows.at(t)[c] = narrowed<K>(slot(number)[t * LANES + c]);
        }
    }
};

// A vector of channels, or what is left of one.
template <typename K, typename A>
void solve_rest(const Problem& problem, const Piece& piece, int64_t sample, const Columns<K>& given, char* memory) {
    const Packed<A> packed(memory, problem.tokens, std::min<int64_t>(LANES, problem.channels - piece.channel));
    memory += Packed<A>::size(problem.tokens);
    Columns<A> columns{packed.take(given.k, 0), packed.take(given.v, 1), {}, {}, {}, {}};
    if (problem.backward) {
        columns.gy = packed.take(given.gy, 2);
        columns.gk = packed.room(3);
        columns.gv = packed.room(4);
    } else {
        columns.y = packed.room(5);
    }
    walk<A, A, LANES / lanes<A>>(problem, sample, piece.channel, columns, memory);
    if (problem.backward) {
        packed.give(given.gk, 3);
        packed.give(given.gv, 4);
    } else {
        packed.give(given.y, 5);
    }
}

template <typename K>
void solve_piece(const Problem& problem, const Piece& piece, int64_t sample, char* memory) {
    const auto in = [&](const Tensor& tensor) { return tensor.rows<const K>(sample, piece.channel); };
    const auto out = [&](const Tensor& tensor) { return tensor.rows<K>(sample, piece.channel); };
    Columns<K> columns{in(problem.k), in(problem.v), {}, {}, {}, {}};
    if (problem.backward) {
        columns.gy = in(problem.gy);
        columns.gk = out(problem.gk);
        columns.gv = out(problem.gv);
    } else {
        columns.y = out(problem.y);
    }
    if constexpr (std::is_same_v<K, double>) {
        solve_rest<K, double>(problem, piece, sample, columns, memory);
    } else if (piece.wide) {
        solve_rest<K, double>(problem, piece, sample, columns, memory);
    } else if (piece.whole) {
        walk<K, float, GROUP>(problem, sample, piece.channel, columns, memory);
    } else {
        solve_rest<K, float>(problem, piece, sample, columns, memory);
    }
}

// A thread's memory, kept for its next call unless it is large.
class Scratch {
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    int64_t size = 0;

public:
    static constexpr int64_t KEPT = int64_t{4} << 20;

    char* take(int64_t bytes) {
        if (bytes > size) {
            bytes = (bytes + 63) / 64 * 64;
            memory.reset();
            memory.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
            size = memory ? bytes : 0;
        }
        return memory.get();
    }
    void leave() {
        if (size > KEPT) memory.reset();
        if (!memory) size = 0;
    }
};

thread_local Scratch scratch;

// Which channels are computed together, and how; it depends on nothing but the parameters.
int64_t cut(const Problem& problem, bool only_wide, Piece* pieces) {
    const int64_t group = GROUP * LANES;
    int64_t count = 0;
    for (int64_t first = 0; first < problem.channels; first += group) {
        bool wide = only_wide;
        for (int64_t c = first; c < first + group; ++c) {
            const double most = std::max(std::fabs(problem.w[c] * problem.tokens), std::fabs(problem.u[c]));
            wide |= !(most <= SAFE_IN_FLOAT);
        }
        if (!wide && first + group <= problem.channels) {
            pieces[count++] = {first, true, false};
            continue;
        }
        const int64_t end = std::min(first + group, problem.channels);
        for (int64_t c = first; c < end; c += LANES) pieces[count++] = {c, false, wide};
    }
    return count;
}

template <typename K>
int solve(const Problem& problem, int threads) {
    const std::unique_ptr<Piece[]> pieces(new (std::nothrow) Piece[problem.padded / LANES + 1]);
    if (!pieces) return 1;
    const int64_t count = cut(problem, std::is_same_v<K, double>, pieces.get());
    const int64_t tasks = problem.batch * count;
    const int64_t narrow = Strand<float, float, GROUP>::scratch(problem.tokens, problem.backward);
    const int64_t wide =
        Strand<double, double, 2>::scratch(problem.tokens, problem.backward) + Packed<double>::size(problem.tokens);
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        char* const memory = scratch.take(std::max(narrow, wide));
        failed |= memory == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            if (memory != nullptr) solve_piece<K>(problem, pieces[task % count], task / count, memory);
        }
        scratch.leave();
    }
    return failed;
}

int dispatch(const Problem& problem, int type, int threads) {
    switch (type) {
        case 0: return solve<float>(problem, threads);
        case 1: return solve<BFloat16>(problem, threads);
        case 2: return solve<double>(problem, threads);
        default: return 2;
    }
}

struct Parameters {  // double or float
    const void* start;
    bool in_double;

    double operator[](int64_t i) const {
        return in_double ? static_cast<const double*>(start)[i] : static_cast<const float*>(start)[i];
    }
};

double clamp(double value) { return value > LARGEST ? LARGEST : value < -LARGEST ? -LARGEST : value; }

bool is_within(double value) { return std::fabs(value) <= LARGEST; }

// Large results are fresh memory; the system hands it out in large pages, if asked, at a fraction of the time.
void ask_for_large_pages(const Tensor& tensor, const Problem& problem, std::size_t element) {
#ifdef __linux__
    const std::size_t page = std::size_t{1} << 21;
    const std::size_t size = static_cast<std::size_t>(problem.batch * problem.tokens * problem.channels) * element;
    if (size < std::size_t{16} << 20) return;  // smaller ones are memory that was used before
    const std::uintptr_t from = (reinterpret_cast<std::uintptr_t>(tensor.start) + page - 1) / page * page;
    const std::uintptr_t to = (reinterpret_cast<std::uintptr_t>(tensor.start) + size) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
    (void)tensor, (void)problem, (void)element;
#endif
}

}  // namespace

// Types: 0 float, 1 bfloat16, 2 double; parameters are float or double. Strides are of samples and tokens, in elements; results
// are contiguous. Returns 0, 1 (no memory) or 2 (no such type).
extern "C" int fedseg_bi_wkv(
    int type, int in_double, int threads, int64_t batch, int64_t tokens, int64_t channels,  //
    const void* k, int64_t k_batch, int64_t k_token, const void* v, int64_t v_batch, int64_t v_token,  //
    const void* decay, const void* first, void* y,  // the forward pass, or, where y is null, the backward pass:
    const void* gy, int64_t gy_batch, int64_t gy_token, void* gk, void* gv, void* gdecay, void* gfirst) {
    const int64_t group = GROUP * LANES;
    const int64_t padded = (channels + group - 1) / group * group;
    const bool forward = y != nullptr;
    const int64_t rows = forward ? 0 : batch;
    const std::unique_ptr<double[]> numbers(new (std::nothrow) double[2 * padded * (1 + rows)]());
    if (!numbers) return 1;
    double* const w = numbers.get();
    double* const u = w + padded;
    const Parameters decays{decay, in_double != 0}, firsts{first, in_double != 0};
    for (int64_t c = 0; c < channels; ++c) {
        w[c] = clamp(decays[c]) / tokens;
        u[c] = clamp(firsts[c] / tokens);
    }
    const auto tensor = [&](const void* start, int64_t batch_stride, int64_t token_stride) {
        return Tensor{const_cast<void*>(start), batch_stride, token_stride};
    };
    const auto result = [&](void* start) { return Tensor{start, tokens * channels, channels}; };
    const Problem problem{batch, tokens, channels, !forward, tensor(k, k_batch, k_token), tensor(v, v_batch, v_token),
                          result(y), tensor(gy, gy_batch, gy_token), result(gk), result(gv), padded, w, u, u + padded,
                          u + padded * (1 + rows)};
    const std::size_t element = type == 0 ? 4 : type == 1 ? 2 : 8;
    for (const Tensor& each : {problem.y, problem.gk, problem.gv}) {
        if (each.start != nullptr) ask_for_large_pages(each, problem, element);
    }
    const int failed = dispatch(problem, type, threads);
    if (failed != 0 || forward) return failed;
    for (int64_t c = 0; c < channels; ++c) {
        double gw_sum = 0, gu_sum = 0;
        for (int64_t sample = 0; sample < batch; ++sample) {
            gw_sum += problem.gw[sample * padded + c];
            gu_sum += problem.gu[sample * padded + c];
        }
        const double gw = is_within(decays[c]) ? -std::exp(-w[c]) * gw_sum / tokens : 0;
        const double gu = is_within(firsts[c] / tokens) ? std::exp(u[c]) * gu_sum / tokens : 0;
        if (in_double) {
            static_cast<double*>(gdecay)[c] = gw;
            static_cast<double*>(gfirst)[c] = gu;
        } else {
            static_cast<float*>(gdecay)[c] = static_cast<float>(gw);
            static_cast<float*>(gfirst)[c] = static_cast<float>(gu);
        }
    }
    return 0;
}
