//! The registry: from an address to the extent that holds it. A map of 2 MiB pages answers whether an address is ours
//! without a lock or a write, so that pointers of other allocators pass by at the cost of three loads;
//! the extent itself is found in a sharded table by its first page. An index by region makes what is done to one tag
//! cost in proportion to that tag.

use crate::driver::Addr;
use crate::extent::Extent;
use crate::terms::RegionId;
use dashmap::DashMap;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

/// log2 of a page. Every reservation is aligned to it, so that no two extents share a page.
pub(crate) const PAGE_BITS: u32 = 21;
/// What reservations are aligned to.
pub(crate) const PAGE: u64 = 1 << PAGE_BITS;
/// log2 of a table's entries: three levels of 12 bits and a page make 57 bits of address.
const LEVEL_BITS: u32 = 12;
const ENTRIES: usize = 1 << LEVEL_BITS;

type Leaf = Box<[AtomicU32]>;
type Middle = Box<[OnceLock<Leaf>]>;

/// A number for every page, 0 where nothing was ever set. Reading is wait-free. (The registry's: 1 + the number of pages back to the extent's first.)
pub(crate) struct Pages(Box<[OnceLock<Middle>]>);

fn table<T: Default>() -> Box<[T]> {
    (0..ENTRIES).map(|_| T::default()).collect()
}

fn index(page: u64, level: u32) -> usize {
    (page >> (LEVEL_BITS * level)) as usize & (ENTRIES - 1)
}

impl Pages {
    /// 0 everywhere.
    pub(crate) fn new() -> Pages {
        Pages(table())
    }

    /// The page's number, unless it is 0.
    pub(crate) fn get(&self, page: u64) -> Option<u32> {
        if page >> (LEVEL_BITS * 3) != 0 {
            return None;
        }
        let leaf = self.0.get(index(page, 2))?.get()?.get(index(page, 1))?.get()?;
        let back = leaf.get(index(page, 0))?.load(Ordering::Acquire);
        (back != 0).then_some(back)
    }

    /// Bytes of the tables.
    pub(crate) fn table_bytes(&self) -> usize {
        let middles = self.0.iter().filter_map(OnceLock::get);
        let middle = |middle: &Middle| {
            let leaves = middle.iter().filter(|leaf| leaf.get().is_some()).count();
            ENTRIES * (size_of::<OnceLock<Leaf>>() + leaves * size_of::<AtomicU32>())
        };
        ENTRIES * size_of::<OnceLock<Middle>>() + middles.map(middle).sum::<usize>()
    }

    /// The page's number is 0 again.
    pub(crate) fn clear(&self, page: u64) {
        self.set(page, 0);
    }

    /// Sets the number of a page below 2^36.
    pub(crate) fn set(&self, page: u64, back: u32) {
        let middle = self.0[index(page, 2)].get_or_init(table);
        let leaf = middle[index(page, 1)].get_or_init(table);
        leaf[index(page, 0)].store(back, Ordering::Release);
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pages")
    }
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Registry {
    pages: Pages,
    extents: DashMap<u64, Arc<Extent>>,
    /// First pages of each region's extents. Changed after `extents` when one comes, before it when one goes.
    by_region: DashMap<RegionId, BTreeSet<u64>>,
}

impl Registry {
    /// An empty registry.
    pub(crate) fn new() -> Registry {
        Registry { pages: Pages::new(), extents: DashMap::new(), by_region: DashMap::new() }
    }

    /// Whether the address lies in a page of ours. Wait-free.
    pub(crate) fn owns(&self, addr: Addr) -> bool {
        self.pages.get(addr.0 >> PAGE_BITS).is_some()
    }

    /// The extent that holds `addr`.
    pub(crate) fn find(&self, addr: Addr) -> Option<Arc<Extent>> {
        self.find_page(addr.0 >> PAGE_BITS).filter(|extent| addr.0 < extent.base.0 + extent.size)
    }

    /// The extents that have addresses in a range, by address.
    pub(crate) fn within(&self, range: Range<u64>) -> Vec<Arc<Extent>> {
        let mut found: Vec<Arc<Extent>> = Vec::new();
        let mut page = range.start >> PAGE_BITS;
        while page << PAGE_BITS < range.end {
            match self.find_page(page) {
                Some(extent) => {
                    page = page_range(&extent).end;
                    if extent.base.0 < range.end && range.start < extent.base.0 + extent.size {
                        found.push(extent);
                    }
                }
                None => page += 1,
            }
        }
        found
    }

    fn find_page(&self, page: u64) -> Option<Arc<Extent>> {
        let back = self.pages.get(page)?;
        self.extents.get(&(page + 1 - u64::from(back))).map(|extent| Arc::clone(&extent))
    }

    /// Makes the extent findable. False if its addresses are outside what the map can hold.
    pub(crate) fn insert(&self, extent: &Arc<Extent>) -> bool {
        let pages = page_range(extent);
        let first = pages.start;
        if pages.end >> (LEVEL_BITS * 3) != 0 || pages.end - first >= u64::from(u32::MAX) {
            return false;
        }
        self.extents.insert(first, Arc::clone(extent));
        self.by_region.entry(extent.region).or_default().insert(first);
        pages.for_each(|page| self.pages.set(page, (page - first) as u32 + 1));
        true
    }

    /// Makes the extent unfindable.
    pub(crate) fn remove(&self, extent: &Extent) {
        let pages = page_range(extent);
        let first = pages.start;
        if let Some(mut firsts) = self.by_region.get_mut(&extent.region) {
            firsts.remove(&first);
        }
        pages.for_each(|page| self.pages.set(page, 0));
        self.extents.remove(&first);
    }

    /// Every extent of the regions, ordered by address.
    pub(crate) fn extents_of(&self, regions: impl Iterator<Item = RegionId>) -> Vec<Arc<Extent>> {
        let firsts: Vec<u64> = regions
            .filter_map(|id| self.by_region.get(&id))
            .flat_map(|firsts| firsts.iter().copied().collect::<Vec<_>>())
            .collect();
        let mut found: Vec<Arc<Extent>> =
            firsts.iter().filter_map(|first| self.extents.get(first).map(|extent| Arc::clone(&extent))).collect();
        found.sort_by_key(|extent| extent.base);
        found
    }

    /// Bytes of the tables (of the hash tables, about).
    pub(crate) fn table_bytes(&self) -> u64 {
        let entry = size_of::<(u64, Arc<Extent>)>() + size_of::<u64>();
        (self.pages.table_bytes() + self.extents.len() * entry + self.by_region.len() * size_of::<BTreeSet<u64>>())
            as u64
    }

    /// Every extent that `wanted` says, ordered by address.
    pub(crate) fn extents(&self, wanted: impl Fn(&Extent) -> bool) -> Vec<Arc<Extent>> {
        let mut found: Vec<Arc<Extent>> =
            self.extents.iter().filter(|entry| wanted(entry.value())).map(|entry| Arc::clone(entry.value())).collect();
        found.sort_by_key(|extent| extent.base);
        found
    }
}

fn page_range(extent: &Extent) -> std::ops::Range<u64> {
    extent.base.0 >> PAGE_BITS..(extent.base.0 + extent.size).div_ceil(PAGE)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::driver::Device;

    fn extent(base: u64, size: u64) -> Arc<Extent> {
        extent_of(0, base, size)
    }

    fn extent_of(region: u32, base: u64, size: u64) -> Arc<Extent> {
        Extent::new(Addr(base), (size, size, size), Device(0), RegionId(region), None).0
    }

    /// The twin is the scan over everything.
    #[test]
    fn the_index_finds_what_a_scan_finds() {
        let registry = Registry::new();
        let extents: Vec<_> = (0..300).map(|i| extent_of(i % 7, u64::from((i * 89) % 300) * PAGE, PAGE)).collect();
        extents.iter().for_each(|extent| assert!(registry.insert(extent)));
        extents.iter().step_by(3).for_each(|extent| registry.remove(extent));
        for wanted in [vec![], vec![3], vec![6, 1], vec![9]] {
            let bases = |found: Vec<Arc<Extent>>| found.iter().map(|extent| extent.base).collect::<Vec<_>>();
            let scan = registry.extents(|extent| wanted.contains(&extent.region.0));
            assert_eq!(bases(registry.extents_of(wanted.iter().map(|&id| RegionId(id)))), bases(scan), "{wanted:?}");
        }
    }

    #[test]
    fn interior_addresses_find_their_extent() {
        let registry = Registry::new();
        let (a, b) = (extent(PAGE * 7, PAGE * 5000), extent((1 << 57) - 2 * PAGE, 4096));
        assert!(registry.insert(&a) && registry.insert(&b));
        for (addr, found) in [(PAGE * 7, &a), (PAGE * 5006 + 99, &a), ((1 << 57) - 2 * PAGE + 4095, &b)] {
            assert!(registry.owns(Addr(addr)));
            assert_eq!(registry.find(Addr(addr)).map(|e| e.base), Some(found.base));
        }
        for addr in [0, PAGE * 6, PAGE * 5007, (1 << 57) - 2 * PAGE + 4096, u64::MAX] {
            assert!(registry.find(Addr(addr)).is_none());
        }
        assert!(!registry.owns(Addr(u64::MAX)) && !registry.owns(Addr(PAGE * 5007)));
        registry.remove(&a);
        assert!(!registry.owns(Addr(PAGE * 7)) && registry.find(Addr(PAGE * 8)).is_none());
        assert_eq!(registry.extents(|_| true).len(), 1);
    }

    #[test]
    fn addresses_beyond_the_map_are_refused() {
        assert!(!Registry::new().insert(&extent(1 << 57, PAGE)));
    }
}
