// A c10d backend that hands every call on to another backend and records it in a ring.
//
// `gangline_recorder_attach` puts it in the place of a process group's backend, so that it sees what
// Python, DDP's reducer, FSDP2, functional collectives and DTensor do: all of them reach a backend
// only through its group. Nothing here takes the GIL, and no Python header is needed.
//
// When an operation ends is learnt in one of three ways:
//   Future   of the backend's Work where it has one: its callback runs in the backend's own thread at
//            the moment of completion (gloo's collectives)
//   wait     else the caller gets a RecordedWork, which stamps when its wait returns (gloo's send,
//            recv and reduce_scatter); such a record bears kEndAtWait
//   hook     on NCCL, where futures complete at the enqueue, the completion hook of its watchdog
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <array>
#include <cstdio>
#include <mutex>
#include <string>
#include <vector>

#include "recorder_ring.hpp"
#include "recorder_work.hpp"

namespace gangline {
namespace {

constexpr uint8_t kMonitoredBarrier = 64;  // has no OpType

class RecordingBackend : public Backend {
 public:
  RecordingBackend(intrusive_ptr<Backend> inner, std::shared_ptr<Ring> ring,
                   std::vector<int32_t> ranks)
      : Backend(inner->getRank(), inner->getSize()),
        inner_(std::move(inner)),
        ring_(std::move(ring)),
        ranks_(std::move(ranks)),
        sends_(size_),
        recvs_(size_) {
    pg_uid_ = inner_->getGroupUid();
    pg_desc_ = inner_->getGroupDesc();
    bound_device_id_ = inner_->getBoundDeviceId();
    use_pg_for_symm_mem_rendezvous_ = inner_->getUsePgForSymmMemRendezvous();
    ends_ = inner_->getBackendName() == "nccl" ? follow_by_hook() : kEndsStamped;
    ring_->set_ends(ends_);
  }

  const intrusive_ptr<Backend>& inner() const { return inner_; }
  void close_ring() { ring_->close(); }

  // --- recorded --------------------------------------------------------------------------------

  WorkPtr broadcast(Tensors& tensors, const BroadcastOptions& opts) override {
    return collective(OpType::BROADCAST, Size(tensors), opts.rootRank,
                      [&] { return inner_->broadcast(tensors, opts); });
  }
  WorkPtr allreduce(Tensors& tensors, const AllreduceOptions& opts) override {
    return collective(OpType::ALLREDUCE, Size(tensors), -1,
                      [&] { return inner_->allreduce(tensors, opts); });
  }
  WorkPtr allreduce_sparse(Tensors& tensors, const AllreduceOptions& opts) override {
    return collective(OpType::_ALLREDUCE_SPARSE, Size(tensors), -1,
                      [&] { return inner_->allreduce_sparse(tensors, opts); });
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const AllreduceCoalescedOptions& opts) override {
    return collective(OpType::ALLREDUCE_COALESCED, Size(tensors), -1,
                      [&] { return inner_->allreduce_coalesced(tensors, opts); });
  }
  WorkPtr reduce(Tensors& tensors, const ReduceOptions& opts) override {
    return collective(OpType::REDUCE, Size(tensors), opts.rootRank,
                      [&] { return inner_->reduce(tensors, opts); });
  }
  WorkPtr allgather(TensorLists& out, Tensors& in, const AllgatherOptions& opts) override {
    return collective(OpType::ALLGATHER, Size(in), -1,
                      [&] { return inner_->allgather(out, in, opts); });
  }
  WorkPtr _allgather_base(Tensor& out, Tensor& in, const AllgatherOptions& opts) override {
    return collective(OpType::_ALLGATHER_BASE, Size(in), -1,
                      [&] { return inner_->_allgather_base(out, in, opts); });
  }
  WorkPtr allgather_coalesced(TensorLists& out, Tensors& in,
                              const AllgatherOptions& opts) override {
    return collective(OpType::ALLGATHER_COALESCED, Size(in), -1,
                      [&] { return inner_->allgather_coalesced(out, in, opts); });
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& out, Tensors& in,
                                          const AllgatherOptions& opts) override {
    return collective(OpType::ALLGATHER_COALESCED, Size(in), -1,
                      [&] { return inner_->allgather_into_tensor_coalesced(out, in, opts); });
  }
  WorkPtr gather(TensorLists& out, Tensors& in, const GatherOptions& opts) override {
    return collective(OpType::GATHER, Size(in), opts.rootRank,
                      [&] { return inner_->gather(out, in, opts); });
  }
  WorkPtr scatter(Tensors& out, TensorLists& in, const ScatterOptions& opts) override {
    return collective(OpType::SCATTER, Size(out), opts.rootRank,
                      [&] { return inner_->scatter(out, in, opts); });
  }
  WorkPtr reduce_scatter(Tensors& out, TensorLists& in, const ReduceScatterOptions& opts) override {
    return collective(OpType::REDUCE_SCATTER, Size(in), -1,
                      [&] { return inner_->reduce_scatter(out, in, opts); });
  }
  WorkPtr _reduce_scatter_base(Tensor& out, Tensor& in, const ReduceScatterOptions& opts) override {
    return collective(OpType::_REDUCE_SCATTER_BASE, Size(in), -1,
                      [&] { return inner_->_reduce_scatter_base(out, in, opts); });
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in,
                                          const ReduceScatterOptions& opts) override {
    return collective(OpType::REDUCE_SCATTER_TENSOR_COALESCED, Size(in), -1,
                      [&] { return inner_->reduce_scatter_tensor_coalesced(out, in, opts); });
  }
  WorkPtr alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& out_splits,
                        std::vector<int64_t>& in_splits, const AllToAllOptions& opts) override {
    return collective(OpType::ALLTOALL_BASE, Size(in), -1, [&] {
      return inner_->alltoall_base(out, in, out_splits, in_splits, opts);
    });
  }
  WorkPtr alltoall(Tensors& out, Tensors& in, const AllToAllOptions& opts) override {
    return collective(OpType::ALLTOALL, Size(in), -1,
                      [&] { return inner_->alltoall(out, in, opts); });
  }
  WorkPtr barrier(const BarrierOptions& opts) override {
    return collective(OpType::BARRIER, Size(), -1, [&] { return inner_->barrier(opts); });
  }
  void monitoredBarrier(const BarrierOptions& opts, bool wait_all_ranks) override {
    uint64_t number = ring_->begin({kMonitoredBarrier, -1, -1, 0, ++num_collectives_});
    try {
      inner_->monitoredBarrier(opts, wait_all_ranks);
    } catch (...) {
      ring_->end(number, kFailed);
      throw;
    }
    ring_->end(number, kDone);
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    return record(OpType::SEND, Size(tensors), to, next(sends_, to),
                  [&] { return inner_->send(tensors, to, tag); });
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    return record(OpType::RECV, Size(tensors), from, next(recvs_, from),
                  [&] { return inner_->recv(tensors, from, tag); });
  }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    return record(OpType::RECVANYSOURCE, Size(tensors), -1, 0,
                  [&] { return inner_->recvAnysource(tensors, tag); });
  }
  void startCoalescing() override {
    inner_->startCoalescing();
    std::lock_guard<std::mutex> guard(mutex_);
    is_coalescing_ = true;
  }
  WorkPtr endCoalescing() override {
    std::vector<uint64_t> parts;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      is_coalescing_ = false;
      parts.swap(coalesced_);
    }
    Open open{ring_, ring_->begin({static_cast<uint8_t>(OpType::COALESCED), -1, -1, 0, 0}),
              std::move(parts)};
    return follow(OpType::COALESCED, std::move(open), [&] { return inner_->endCoalescing(); });
  }

  // --- handed on -------------------------------------------------------------------------------

  bool supportsSplitting() const override { return inner_->supportsSplitting(); }
  bool supportsCoalescing() const override { return inner_->supportsCoalescing(); }
  bool supportsTimeEstimation() const override { return inner_->supportsTimeEstimation(); }
  bool supportsShrinking() const override { return inner_->supportsShrinking(); }
  bool supportsTensorAlloc(c10::DeviceIndex device) override {
    return inner_->supportsTensorAlloc(device);
  }
  intrusive_ptr<Backend> shrink(const std::vector<int64_t>& ranks, int flags,
                                const intrusive_ptr<Options>& opts) override {
    return inner_->shrink(ranks, flags, opts);
  }
  intrusive_ptr<Backend> split(const intrusive_ptr<Store>& store, const std::vector<int>& ranks,
                               const intrusive_ptr<Options>& opts) override {
    return inner_->split(store, ranks, opts);
  }
  intrusive_ptr<Backend> merge(const intrusive_ptr<Store>& store,
                               const intrusive_ptr<Options>& opts, const int& rank,
                               const int& size) override {
    return inner_->merge(store, opts, rank, size);
  }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }
  const std::string getBackendName() const override { return inner_->getBackendName(); }
  intrusive_ptr<Options> getBackendOptions() override { return inner_->getBackendOptions(); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  void waitForPendingWorks() override { inner_->waitForPendingWorks(); }
  void enableCollectivesTiming() override { inner_->enableCollectivesTiming(); }
  void setGroupUid(const std::string& uid) override {
    pg_uid_ = uid;
    inner_->setGroupUid(uid);
  }
  void eagerConnectSingleDevice(at::Device device) override {
    inner_->eagerConnectSingleDevice(device);
  }
  ErrorType getError() override { return inner_->getError(); }
  std::shared_ptr<c10::Allocator> getMemAllocator() override { return inner_->getMemAllocator(); }
  Tensor allocateTensor(long size, at::TensorOptions options) override {
    return inner_->allocateTensor(size, options);
  }
  void abort() override { inner_->abort(); }
  void shutdown() override {
    inner_->shutdown();
    ring_->close();
  }
  void suspend() override { inner_->suspend(); }
  void resume() override { inner_->resume(); }
  std::unordered_map<std::string, uint64_t> getMemoryStats() override {
    return inner_->getMemoryStats();
  }
  void registerOnCompletionHook(CompletionHook::Hook&& hook) override {
    if (ends_ != kEndsByHook) {
      inner_->registerOnCompletionHook(std::move(hook));
    } else {
      TORCH_CHECK(!hasHooks(), "ProcessGroupNCCL OnCompletion hook already registered");
      hook_->set_users(std::move(hook));
    }
    onCompletionHook_ = [](const std::shared_ptr<WorkInfo>&) {};  // what hasHooks() looks at
  }

 private:
  // Sends to (or receives from) each place, counted; torch counts only collectives.
  using Counters = std::vector<std::atomic<uint64_t>>;
  static uint64_t next(Counters& counters, int place) {
    bool is_known = 0 <= place && static_cast<size_t>(place) < counters.size();
    return is_known ? counters[place].fetch_add(1, std::memory_order_relaxed) + 1 : 0;
  }

  template <class Issue>
  WorkPtr collective(OpType op, Size size, int64_t root, Issue&& issue) {
    return record(op, size, root, ++num_collectives_, std::forward<Issue>(issue));
  }

  template <class Issue>
  WorkPtr record(OpType op, Size size, int64_t place, uint64_t match, Issue&& issue) {
    bool has_peer = 0 <= place && static_cast<size_t>(place) < ranks_.size();
    Call call{static_cast<uint8_t>(op), size.dtype, has_peer ? ranks_[place] : -1, size.num_bytes,
              match};
    if (is_coalescing_.load(std::memory_order_relaxed)) {
      call.flags = kInCoalesced;
      uint64_t number = ring_->begin(call);
      {
        std::lock_guard<std::mutex> guard(mutex_);
        coalesced_.push_back(number);
      }
      return issue();
    }
    return follow(op, Open{ring_, ring_->begin(call), {}}, std::forward<Issue>(issue));
  }

  // Starts the operation, and sees to it that its end is stamped.
  template <class Issue>
  WorkPtr follow(OpType op, Open open, Issue&& issue) {
    WorkPtr work;
    try {
      work = issue();
    } catch (...) {
      open.end(kFailed);
      throw;
    }
    if (!work) {
      open.end(kDone);
      return work;
    }
    if (ends_ == kEndsUnknown) return work;
    if (ends_ == kEndsByHook) {
      hook_->expect({work->retrieveOpType(), work->getSequencenumber()}, std::move(open));
      return work;
    }
    auto future = future_of(op, work);
    if (future == nullptr) {
      bool needs_ranks = op == OpType::RECVANYSOURCE;
      return c10::make_intrusive<RecordedWork>(rank_, op, std::move(work), std::move(open),
                                               needs_ranks ? ranks_ : std::vector<int32_t>());
    }
    future->addCallback(
        [open = std::move(open)](c10::ivalue::Future& done) {
          open.end(done.hasError() ? kFailed : kDone);
        },
        /*uses_future=*/false);
    return work;
  }

  // Whether a kind of Work has a future is asked once per kind: the answer "no" is an exception.
  intrusive_ptr<c10::ivalue::Future> future_of(OpType op, const WorkPtr& work) {
    auto& has_none = has_no_future_[static_cast<uint8_t>(op)];
    if (has_none.load(std::memory_order_relaxed)) return nullptr;
    try {
      return work->getFuture();
    } catch (const std::exception&) {
      has_none.store(true, std::memory_order_relaxed);
      return nullptr;
    }
  }

  Ends follow_by_hook() {
    try {
      inner_->enableCollectivesTiming();
      auto hook = std::make_shared<CompletionHook>();
      inner_->registerOnCompletionHook(
          [hook](const std::shared_ptr<WorkInfo>& info) { hook->completed(info); });
      hook_ = std::move(hook);
      return kEndsByHook;
    } catch (const std::exception&) {  // somebody else's hook is there
      return kEndsUnknown;
    }
  }

  intrusive_ptr<Backend> inner_;
  std::shared_ptr<Ring> ring_;
  std::vector<int32_t> ranks_;  // group rank -> global rank; empty: not known
  Ends ends_ = kEndsUnknown;
  std::shared_ptr<CompletionHook> hook_;
  std::array<std::atomic<bool>, 256> has_no_future_{};
  std::atomic<uint64_t> num_collectives_{0};
  Counters sends_, recvs_;
  std::mutex mutex_;
  std::atomic<bool> is_coalescing_{false};
  std::vector<uint64_t> coalesced_;
};

// Reaches the tables of a group, which torch lets only add to, never change.
struct Tables : ProcessGroup {
  static auto& by_device(ProcessGroup& group) { return group.*(&Tables::deviceTypeToBackend_); }
  static auto& by_type(ProcessGroup& group) { return group.*(&Tables::backendTypeToBackend_); }

  static void put(ProcessGroup& group, const intrusive_ptr<Backend>& old,
                  const intrusive_ptr<Backend>& with) {
    auto before = old;  // `old` may be an entry of the tables
    for (auto& entry : by_device(group))
      if (entry.second == before) entry.second = with;
    for (auto& entry : by_type(group))
      if (entry.second == before) entry.second = with;
  }
};

ProcessGroup& group_of(int64_t id) {
  return *reinterpret_cast<ProcessGroup*>(static_cast<std::intptr_t>(id));
}

void copy_error(const std::string& text, char* error, size_t error_bytes) {
  std::snprintf(error, error_bytes, "%s", text.c_str());
}

}  // namespace
}  // namespace gangline

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT uint32_t gangline_recorder_version() {
  return gangline::kFormatVersion;
}

// Records the group's (ProcessGroup::getID) backend for this type of device in the ring at `path`.
// Returns 1; 0 when it is recorded already; -1 with the reason in `error`.
EXPORT int gangline_recorder_attach(int64_t id, const char* device, const char* path,
                                    const int32_t* ranks, int num_ranks, char* error,
                                    size_t error_bytes) {
  using namespace gangline;
  try {
    auto& group = group_of(id);
    auto inner = group.getBackend(c10::Device(device).type());
    if (dynamic_cast<RecordingBackend*>(inner.get()) != nullptr) return 0;
    std::string reason;
    auto ring = Ring::open(path, reason);
    if (ring == nullptr) {
      copy_error(reason, error, error_bytes);
      return -1;
    }
    auto recorder = c10::make_intrusive<RecordingBackend>(
        inner, std::move(ring), std::vector<int32_t>(ranks, ranks + num_ranks));
    Tables::put(group, inner, recorder);
    return 1;
  } catch (const std::exception& problem) {
    copy_error(problem.what(), error, error_bytes);
    return -1;
  }
}

// Gives the group its own backends back. Not while an operation is being enqueued.
EXPORT int gangline_recorder_detach(int64_t id) {
  using namespace gangline;
  auto& group = group_of(id);
  int num_detached = 0;
  std::vector<c10::intrusive_ptr<c10d::Backend>> backends;
  for (const auto& entry : Tables::by_device(group)) backends.push_back(entry.second);
  for (const auto& backend : backends) {
    if (auto* recorder = dynamic_cast<RecordingBackend*>(backend.get())) {
      recorder->close_ring();
      Tables::put(group, backend, recorder->inner());
      ++num_detached;
    }
  }
  return num_detached;
}
