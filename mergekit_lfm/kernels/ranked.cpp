// Coins that depend on ranks: the compiled form of `ranked_mask` in random.py, to the bit, for float32.
//
// A row's entries are put into slots by their magnitudes, 1/8 of the slots for each power of two below the largest. Then
// all are in order but those that share a slot with others; these few are moved.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t NOT_A_NUMBER = 0x7F800001;  // all NaNs count as equal, and as larger than infinity
constexpr int FEWEST = 3, MOST = 12;           // slots, as powers of two
constexpr int MOVES = 16;                      // for each entry, before sorting takes less time

uint32_t magnitude(uint32_t bits) { return std::min(bits & 0x7FFFFFFFu, NOT_A_NUMBER); }

// entries: index in the lower half, by falling magnitude. slot: scratch. Both are as long as the row.
void rank(const uint32_t *x, uint32_t row, uint32_t *slot, uint64_t *entries) {
    int digits = FEWEST;
    while (digits < MOST && row >> (digits + 1)) digits++;
    const uint32_t slots = 1u << digits, shift = 26 - digits;

    uint32_t top = 0;
    for (uint32_t i = 0; i < row; i++) top = std::max(top, magnitude(x[i]));
    top >>= shift;
    const uint32_t bottom = top < slots ? 0 : top - (slots - 1);
    for (uint32_t i = 0; i < row; i++) slot[i] = top - std::max(magnitude(x[i]) >> shift, bottom);

    uint32_t next[(1 << MOST) + 1];
    std::memset(next, 0, (slots + 1) * sizeof *next);
    for (uint32_t i = 0; i < row; i++) next[slot[i] + 1]++;
    for (uint32_t s = 1; s < slots; s++) next[s + 1] += next[s];
    for (uint32_t i = 0; i < row; i++)
        entries[next[slot[i]]++] = uint64_t(NOT_A_NUMBER - magnitude(x[i])) << 32 | i;

    uint64_t moves = 0;
    for (uint32_t i = 1; i < row; i++) {
        const uint64_t entry = entries[i];
        if (entries[i - 1] < entry) continue;
        uint32_t at = i;
        do {
            entries[at] = entries[at - 1];
            at--;
        } while (at && entries[at - 1] > entry);
        entries[at] = entry;
        moves += i - at;
        if (moves > uint64_t(MOVES) * row) return std::sort(entries, entries + row);
    }
}

// The generator's word of two entries, `words` in random.py.
uint64_t word(uint64_t key, int64_t pair) {
    uint64_t z = key + uint64_t(pair + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

int8_t below(uint64_t number, int32_t limit) { return ((int32_t(number) >> 1) - limit) >> 31; }

// The masks of the entries from index `start` on.
void draw(uint64_t key, int64_t start, uint32_t count, const int32_t *limit, int8_t *mask) {
    if (start % 2 && count) {
        *mask++ = below(word(key, start++ / 2) >> 32, *limit++);
        count--;
    }
    for (uint32_t i = 0; i < count / 2; i++) {
        const uint64_t both = word(key, start / 2 + i);
        mask[2 * i] = below(both, limit[2 * i]);
        mask[2 * i + 1] = below(both >> 32, limit[2 * i + 1]);
    }
    if (count % 2) mask[count - 1] = below(word(key, (start + count) / 2), limit[count - 1]);
}

}  // namespace

// mask [rows * row]: all ones for the entries of x that are kept by the coins of the state `key`, whose limits depend on
// the rank in the row. scratch: three times as long as a row.
extern "C" void ranked_mask(const uint32_t *x, int64_t rows, uint32_t row, uint64_t key, const int32_t *limits,
                            uint32_t *scratch, int8_t *mask) {
    uint64_t *entries = reinterpret_cast<uint64_t *>(scratch);
    int32_t *limit = reinterpret_cast<int32_t *>(scratch + 2 * row);
    for (int64_t start = 0; start < rows * row; start += row) {
        rank(x + start, row, scratch + 2 * row, entries);
        for (uint32_t i = 0; i < row; i++) limit[uint32_t(entries[i])] = limits[i];
        draw(key, start, row, limit, mask + start);
    }
}
