// The writer of a ring of communication records; layout and rules are in ring_format.py.
//
// Any number of threads may begin and end operations. A slot is taken for a new operation only when
// nobody is writing into it, and an end is written only while the slot still belongs to the
// operation, so a slow thread never writes into the record of a later operation.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

namespace gangline {

constexpr uint32_t kFormatVersion = 1;
constexpr uint8_t kEndAtWait = 1;
constexpr uint8_t kInCoalesced = 2;

enum Phase : uint64_t { kWriting = 1, kOpen = 2, kEnding = 3, kDone = 4, kFailed = 5, kDropped = 6 };
enum Ends : uint32_t { kEndsUnknown = 0, kEndsStamped = 1, kEndsByHook = 2 };

struct Record {
  std::atomic<uint64_t> stamp;
  std::atomic<uint64_t> enqueue_ns;
  std::atomic<uint64_t> end_ns;
  std::atomic<uint64_t> start_ns;
  std::atomic<uint64_t> num_bytes;
  std::atomic<uint64_t> match;
  std::atomic<int32_t> peer;
  std::atomic<uint8_t> op;
  std::atomic<int8_t> dtype;
  std::atomic<uint8_t> flags;
  uint8_t unused;
  uint64_t reserved;
};
static_assert(sizeof(Record) == 64 && offsetof(Record, peer) == 48 && offsetof(Record, op) == 52);

struct Header {
  char magic[8];
  uint32_t version, header_bytes, record_bytes, capacity, meta_bytes;
  std::atomic<uint32_t> ends;
  uint64_t created_ns;
  std::atomic<uint64_t> closed_ns;
  alignas(64) std::atomic<uint64_t> num_enqueued;
  alignas(64) std::atomic<uint64_t> num_ended;
  std::atomic<uint64_t> last_ended;
};
static_assert(offsetof(Header, ends) == 28 && offsetof(Header, closed_ns) == 40);
static_assert(offsetof(Header, num_enqueued) == 64 && offsetof(Header, last_ended) == 136);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

inline uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

// What is known of an operation when it is enqueued.
struct Call {
  uint8_t op;
  int8_t dtype;  // -1: no tensor
  int32_t peer;  // global rank, -1: none
  uint64_t num_bytes;
  uint64_t match;
  uint8_t flags = 0;
};

class Ring {
 public:
  // Maps the ring at `path`; null, with the reason in `error`, when that cannot be done.
  static std::shared_ptr<Ring> open(const char* path, std::string& error) {
    int fd = ::open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat status {};
    if (fd < 0 || fstat(fd, &status) != 0) {
      error = std::string(path) + ": " + std::strerror(errno);
      if (fd >= 0) ::close(fd);
      return nullptr;
    }
    auto size = static_cast<size_t>(status.st_size);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    ::close(fd);
    if (memory == MAP_FAILED) {
      error = std::string(path) + ": " + std::strerror(errno);
      return nullptr;
    }
    auto ring = std::shared_ptr<Ring>(new Ring(path, static_cast<char*>(memory), size));
    const Header& header = *ring->header_;
    bool is_right = size >= sizeof(Header) && std::memcmp(header.magic, "GANGRING", 8) == 0 &&
        header.version == kFormatVersion && header.record_bytes == sizeof(Record) &&
        (header.capacity & (header.capacity - 1)) == 0 &&
        size == header.header_bytes + size_t{header.capacity} * sizeof(Record);
    if (!is_right) {
      ring->is_closed_ = true;  // so that it is not removed
      error = std::string(path) + " is not a ring of this format";
      return nullptr;
    }
    return ring;
  }

  ~Ring() {
    close();
    munmap(memory_, size_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  void set_ends(Ends ends) {
    header_->ends.store(ends, std::memory_order_relaxed);
  }

  // Returns the number of the operation.
  uint64_t begin(const Call& call) {
    uint64_t number = header_->num_enqueued.fetch_add(1, std::memory_order_relaxed) + 1;
    Record& record = at(number);
    if (!take(record, number)) return number;  // a whole lap late: newer ones stand there already
    record.enqueue_ns.store(now_ns(), std::memory_order_relaxed);
    record.end_ns.store(0, std::memory_order_relaxed);
    record.start_ns.store(0, std::memory_order_relaxed);
    record.num_bytes.store(call.num_bytes, std::memory_order_relaxed);
    record.match.store(call.match, std::memory_order_relaxed);
    record.peer.store(call.peer, std::memory_order_relaxed);
    record.op.store(call.op, std::memory_order_relaxed);
    record.dtype.store(call.dtype, std::memory_order_relaxed);
    record.flags.store(call.flags, std::memory_order_relaxed);
    record.stamp.store(number << 3 | kOpen, std::memory_order_release);
    return number;
  }

  // Ends an operation; the first end counts. `peer` -1 leaves the peer as it is.
  void end(uint64_t number, Phase phase, uint8_t flags = 0, int32_t peer = -1,
           uint64_t end_ns = now_ns(), uint64_t start_ns = 0) {
    Record& record = at(number);
    uint64_t stamp = number << 3 | kOpen;
    if (record.stamp.compare_exchange_strong(stamp, number << 3 | kEnding)) {
      std::atomic_thread_fence(std::memory_order_release);
      record.end_ns.store(end_ns, std::memory_order_relaxed);
      record.start_ns.store(start_ns, std::memory_order_relaxed);
      if (flags) record.flags.fetch_or(flags, std::memory_order_relaxed);
      if (peer >= 0) record.peer.store(peer, std::memory_order_relaxed);
      record.stamp.store(number << 3 | phase, std::memory_order_release);
    } else if (stamp >> 3 == number) {
      return;  // ended before
    }
    header_->num_ended.fetch_add(1, std::memory_order_relaxed);
    uint64_t last = header_->last_ended.load(std::memory_order_relaxed);
    while (last < number && !header_->last_ended.compare_exchange_weak(last, number)) {
    }
  }

  // Marks the ring as given up and takes its name away; who has it open can still read it.
  void close() {
    // A fork that ends must not take the ring of its parent away.
    if (getpid() != pid_ || is_closed_.exchange(true)) return;
    header_->closed_ns.store(now_ns(), std::memory_order_release);
    unlink(path_.c_str());
  }

 private:
  Ring(const char* path, char* memory, size_t size)
      : path_(path), memory_(memory), size_(size), header_(reinterpret_cast<Header*>(memory)) {}

  Record& at(uint64_t number) {
    auto* records = reinterpret_cast<Record*>(memory_ + header_->header_bytes);
    return records[(number - 1) & (header_->capacity - 1)];
  }

  static bool take(Record& record, uint64_t number) {
    uint64_t stamp = record.stamp.load(std::memory_order_relaxed);
    while (stamp >> 3 < number) {
      bool is_busy = (stamp & 7) == kWriting || (stamp & 7) == kEnding;
      if (is_busy) {
        sched_yield();
        stamp = record.stamp.load(std::memory_order_relaxed);
      } else if (record.stamp.compare_exchange_weak(stamp, number << 3 | kWriting)) {
        std::atomic_thread_fence(std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  std::string path_;
  char* memory_;
  size_t size_;
  Header* header_;
  pid_t pid_ = getpid();
  std::atomic<bool> is_closed_{false};
};

}  // namespace gangline
