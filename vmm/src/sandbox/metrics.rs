//! What the shares have counted, as OpenMetrics text: what Prometheus and its like read.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use devices::dax::DaxWindow;
use devices::fuse::{LATENCY_CLASSES, OperationCounts, latency_bound};
use devices::tree::MemberInfo;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::live::Live;
use super::shares::{RunningShare, Shares};

/// Numbers of a share that may become less again; all others only ever grow.
const GAUGES: [&str; 9] = [
    "dax_live",
    "dax_mapped_bytes",
    "dax_promised_bytes",
    "members",
    "members_removed",
    "watch_live",
    "watch_directories",
    "watch_names",
    "watch_pending",
];

/// What one share, or one of those behind it, has counted up to some moment.
#[derive(Debug)]
struct Counted {
    tag: String,
    path: String,
    /// Bytes of its window, 0 without one; `None` for what is behind a device that is counted itself.
    window: Option<u64>,
    operations: Vec<OperationCounts>,
    /// All that is not of one operation.
    others: Vec<(&'static str, u64)>,
}

impl Counted {
    fn of(share: &RunningShare) -> Self {
        let operations = share.session.counters().operations();
        let named = |name: &str| operations.iter().any(|of| of.name == name);
        let mut others = share.counters();
        others.retain(|(name, _)| !named(name));
        Self {
            tag: share.tag.clone(),
            path: share.guest.clone(),
            window: Some(share.window.as_ref().map_or(0, |window| window.size())),
            operations,
            others,
        }
    }

    /// One of a tree's. What its device counts is not said again.
    fn of_member(share: &RunningShare, live: &Live, member: &MemberInfo) -> Self {
        let counters = &member.counters;
        Self {
            tag: share.tag.clone(),
            path: live.guest_path(&member.path),
            window: None,
            operations: counters.operations(),
            others: vec![
                ("bytes_read", counters.bytes_read.load(Relaxed)),
                ("bytes_written", counters.bytes_written.load(Relaxed)),
            ],
        }
    }

    /// A device, and what it has of its own.
    fn all_of(share: &RunningShare) -> Vec<Self> {
        let live = share.live.iter();
        // What is left of one that was removed has a path that another may have by now.
        let members = live.flat_map(|live| {
            let there = live.tree.list().into_iter().filter(|member| !member.removed);
            there.map(|member| Self::of_member(share, live, &member)).collect::<Vec<_>>()
        });
        std::iter::once(Self::of(share)).chain(members).collect()
    }

    fn labels(&self) -> [(&str, &str); 2] {
        [("tag", &self.tag), ("path", &self.path)]
    }
}

/// All shares of a sandbox.
#[derive(Debug)]
struct Collected(Vec<Counted>);

impl Collected {
    /// A metric of each operation of each share.
    fn each_operation(
        &self,
        mut metric: MetricEncoder<'_>,
        put: impl Fn(&mut MetricEncoder<'_>, &OperationCounts) -> fmt::Result,
    ) -> fmt::Result {
        for share in &self.0 {
            for of in &share.operations {
                let [tag, path] = share.labels();
                put(&mut metric.encode_family(&[tag, path, ("operation", of.name)])?, of)?;
            }
        }
        Ok(())
    }
}

impl Collector for Collected {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "FUSE requests of the guest";
        let metric = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
        self.each_operation(metric, |metric, of| count(metric, of.requests))?;
        let help = "Of these, such as were answered with an errno";
        let metric =
            encoder.encode_descriptor("request_errors", help, None, MetricType::Counter)?;
        self.each_operation(metric, |metric, of| count(metric, of.errors))?;
        let help = "How long it took to serve a request";
        let (unit, kind) = (Some(&Unit::Seconds), MetricType::Histogram);
        let metric = encoder.encode_descriptor("request_duration", help, unit, kind)?;
        self.each_operation(metric, histogram)?;

        // Every share has the same ones, but for those of its window and of its policy.
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in self.0.iter().flat_map(|share| &share.others) {
            if !names.contains(name) {
                names.push(name);
            }
        }
        for name in names {
            let gauge = GAUGES.contains(&name);
            let kind = if gauge { MetricType::Gauge } else { MetricType::Counter };
            let help = "The counter of that name in the share's statistics";
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for share in &self.0 {
                let of_that_name = |(other, _): &&(&str, u64)| *other == name;
                let Some((_, value)) = share.others.iter().find(of_that_name) else { continue };
                let labels = share.labels();
                let mut metric = metric.encode_family(&labels)?;
                match gauge {
                    true => metric.encode_gauge(value)?,
                    false => count(&mut metric, *value)?,
                }
            }
        }
        let help = "Size of the DAX window";
        let (unit, kind) = (Some(&Unit::Bytes), MetricType::Gauge);
        let mut metric = encoder.encode_descriptor("window", help, unit, kind)?;
        for share in &self.0 {
            if let Some(size) = share.window {
                metric.encode_family(&share.labels())?.encode_gauge(&size)?;
            }
        }
        Ok(())
    }
}

fn count(metric: &mut MetricEncoder<'_>, value: u64) -> fmt::Result {
    metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn histogram(metric: &mut MetricEncoder<'_>, of: &OperationCounts) -> fmt::Result {
    let mut buckets = [(0.0, 0); LATENCY_CLASSES];
    for (class, (bucket, count)) in buckets.iter_mut().zip(of.latency).enumerate() {
        // No bound is infinity: "+Inf" of the text format.
        *bucket = (latency_bound(class).map_or(f64::INFINITY, |bound| bound.as_secs_f64()), count);
    }
    let sum = of.nanoseconds as f64 / 1e9;
    metric.encode_histogram::<NoLabelSet>(sum, of.latency.iter().sum(), &buckets, None)
}

/// What all shares have counted, as text. Names begin with `oriel_share_`.
///
/// # Errors
///
/// Of the encoder, in a line.
pub fn openmetrics(shares: &Shares) -> Result<String, String> {
    let mut registry = Registry::with_prefix("oriel_share");
    registry.register_collector(Box::new(Collected(
        shares.0.iter().flat_map(Counted::all_of).collect(),
    )));
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|error| error.to_string())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::shares::tests::shares;
    use super::*;

    #[test]
    fn counters_and_histograms_are_openmetrics_text() {
        let shares = shares();
        let init = |minor: u32| {
            // Header: length, opcode, unique, and nothing else that counts; then version and flags.
            let mut request = vec![0u8; 40 + 16];
            request[..4].copy_from_slice(&56u32.to_ne_bytes());
            request[4..8].copy_from_slice(&26u32.to_ne_bytes());
            request[40..44].copy_from_slice(&7u32.to_ne_bytes());
            request[44..48].copy_from_slice(&minor.to_ne_bytes());
            request
        };
        let mut reply = [0u8; 256];
        let session = &shares.0[1].session;
        let mut request = init(40);
        use devices::memory::GuestBuffer;
        let mut serve = |request: &mut [u8]| {
            let reply = GuestBuffer::from_slice(&mut reply);
            // Not urgent, and so an error on the urgent queue: counted all the same.
            session.serve_urgent(&GuestBuffer::from_slice(request), &reply)
        };
        assert_eq!(serve(&mut request), 16);
        let text = openmetrics(&shares).unwrap();
        for line in [
            "# TYPE oriel_share_requests counter",
            "oriel_share_requests_total{tag=\"data\",path=\"/data\",operation=\"INIT\"} 1",
            "oriel_share_request_errors_total{tag=\"data\",path=\"/data\",operation=\"INIT\"} 1",
            "# TYPE oriel_share_request_duration_seconds histogram",
            "# UNIT oriel_share_request_duration_seconds seconds",
            "oriel_share_request_duration_seconds_count{tag=\"data\",path=\"/data\",operation=\"INIT\"} 1",
            "oriel_share_request_duration_seconds_bucket{le=\"+Inf\",tag=\"data\",path=\"/data\",operation=\"INIT\"} 1",
            "oriel_share_bytes_read_total{tag=\"root\",path=\"/\"} 0",
            "# TYPE oriel_share_dax_live gauge",
            "oriel_share_dax_live{tag=\"data\",path=\"/data\"} 0",
            "oriel_share_window_bytes{tag=\"data\",path=\"/data\"} 4194304",
            "oriel_share_window_bytes{tag=\"root\",path=\"/\"} 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        // Each name is described once, and everything else is a sample: a name, labels, a number.
        let mut described = Vec::new();
        for line in text.lines().filter(|line| *line != "# EOF") {
            match line.strip_prefix("# TYPE ") {
                Some(kind) => {
                    assert!(!described.contains(&kind), "{kind} twice");
                    described.push(kind);
                }
                None if line.starts_with("# ") => {}
                None => {
                    let value = line.rsplit_once(' ').unwrap().1;
                    assert!(value.parse::<f64>().is_ok(), "{line}");
                }
            }
        }
        // No share, no samples, and still a text.
        let none = openmetrics(&Shares(Vec::new())).unwrap();
        assert!(none.ends_with("# EOF\n") && !none.contains('{'));
    }
}
