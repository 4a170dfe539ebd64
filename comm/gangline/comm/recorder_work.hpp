// How big an operation is, and how its end is learnt.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "recorder_ring.hpp"

namespace gangline {

using namespace c10d;
using at::Tensor;
using c10::intrusive_ptr;
using Tensors = std::vector<Tensor>;
using TensorLists = std::vector<std::vector<Tensor>>;
using WorkPtr = intrusive_ptr<Work>;

struct Size {
  uint64_t num_bytes = 0;
  int8_t dtype = -1;

  Size() = default;
  explicit Size(const Tensor& tensor) { add(tensor); }
  explicit Size(const Tensors& tensors) {
    for (const auto& tensor : tensors) add(tensor);
  }
  explicit Size(const TensorLists& lists) {
    for (const auto& list : lists)
      for (const auto& tensor : list) add(tensor);
  }

  void add(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (dtype < 0) dtype = static_cast<int8_t>(tensor.scalar_type());
    if (tensor.layout() == at::kStrided) {
      num_bytes += static_cast<uint64_t>(tensor.numel()) * tensor.element_size();
    } else if (tensor.is_sparse()) {  // which has no storage of its own
      add(tensor._indices());
      add(tensor._values());
    }
  }
};

// The operations that end together: one, or all of a coalesced group.
struct Open {
  std::shared_ptr<Ring> ring;
  uint64_t number;
  std::vector<uint64_t> coalesced;

  void end(Phase phase, uint8_t flags = 0, int32_t peer = -1, uint64_t end_ns = now_ns(),
           uint64_t start_ns = 0) const {
    for (uint64_t part : coalesced) ring->end(part, phase, flags, -1, end_ns, start_ns);
    ring->end(number, phase, flags, peer, end_ns, start_ns);
  }
};

// Stands for a Work that has no future.
class RecordedWork : public Work {
 public:
  RecordedWork(int rank, OpType op, WorkPtr work, Open open, std::vector<int32_t> ranks)
      : Work(rank, op), work_(std::move(work)), open_(std::move(open)), ranks_(std::move(ranks)) {}
  ~RecordedWork() override { stamp(kDropped); }

  bool wait(std::chrono::milliseconds timeout) override {
    bool is_done = false;
    try {
      is_done = work_->wait(timeout);
    } catch (...) {
      stamp(kFailed);
      throw;
    }
    stamp(is_done ? kDone : kFailed);
    return is_done;
  }
  bool isCompleted() override {
    bool is_completed = work_->isCompleted();
    if (is_completed) stamp(work_->isSuccess() ? kDone : kFailed);
    return is_completed;
  }
  bool isSuccess() const override { return work_->isSuccess(); }
  std::exception_ptr exception() const override { return work_->exception(); }
  int sourceRank() const override { return work_->sourceRank(); }
  Tensors result() override { return work_->result(); }
  void synchronize() override { work_->synchronize(); }
  void blockCurrentStream() override { work_->blockCurrentStream(); }
  void abort() override { work_->abort(); }
  intrusive_ptr<c10::ivalue::Future> getFuture() override { return work_->getFuture(); }
  intrusive_ptr<c10::ivalue::Future> getFutureResult() override { return work_->getFutureResult(); }
  float getDuration() const override { return work_->getDuration(); }
  uint64_t getSequencenumber() const override { return work_->getSequencenumber(); }

 private:
  void stamp(Phase phase) {
    if (is_stamped_.exchange(true)) return;
    int32_t source = -1;
    if (phase == kDone && opType_ == OpType::RECVANYSOURCE) {
      auto rank = static_cast<size_t>(work_->sourceRank());
      if (rank < ranks_.size()) source = ranks_[rank];
    }
    open_.end(phase, kEndAtWait, source);
  }

  WorkPtr work_;
  Open open_;
  std::vector<int32_t> ranks_;
  std::atomic<bool> is_stamped_{false};
};

// Ends what NCCL's watchdog reports as complete; it reports by kind and sequence number.
class CompletionHook {
 public:
  using Hook = std::function<void(std::shared_ptr<WorkInfo>)>;

  using Key = std::pair<OpType, uint64_t>;

  void expect(const Key& key, Open open) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto early = early_.find(key);
    if (early == early_.end()) {
      open_.emplace(key, std::move(open));
    } else {
      end(open, *early->second);
      early_.erase(early);
    }
  }

  void completed(const std::shared_ptr<WorkInfo>& info) {
    Hook hook;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      auto found = open_.find({info->opType, info->seq});
      if (found != open_.end()) {
        end(found->second, *info);
        open_.erase(found);
      } else if (early_.size() < kMaxEarly) {  // faster than the call that enqueued it
        early_.emplace(Key{info->opType, info->seq}, info);
      }
      hook = users_;
    }
    if (hook) hook(info);
  }

  void set_users(Hook hook) {
    std::lock_guard<std::mutex> guard(mutex_);
    users_ = std::move(hook);
  }

 private:
  static constexpr size_t kMaxEarly = 1024;

  static uint64_t ns(std::chrono::time_point<std::chrono::steady_clock> time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
  }
  static void end(const Open& open, const WorkInfo& info) {
    open.end(kDone, 0, -1, ns(info.timeFinished), ns(info.timeStarted));
  }

  std::mutex mutex_;
  std::map<Key, Open> open_;
  std::map<Key, std::shared_ptr<WorkInfo>> early_;
  Hook users_;
};

}  // namespace gangline
