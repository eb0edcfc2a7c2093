//! The Gregorian calendar.

/// The last second of the year 9999, in seconds since 1970.
pub(super) const LAST_SECOND: i64 = 253_402_300_799;

const SECONDS_PER_DAY: i64 = 86_400;
const DAYS_PER_400_YEARS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;

/// A date and time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) second: u8,
    pub(super) minute: u8,
    pub(super) hour: u8,
    /// 1 is Sunday.
    pub(super) weekday: u8,
    pub(super) day: u8,
    pub(super) month: u8,
    /// 0 to 9999.
    pub(super) year: u32,
}

/// Days from 0000-03-01 to the first of the `month`th month after it. Counting years from March puts the
/// leap day last, and makes the months' lengths a linear formula.
fn days_before_month(month: i64) -> i64 {
    (153 * month + 2) / 5
}

impl DateTime {
    /// The date and time `seconds` after the beginning of 1970. Years repeat after 9999.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        let of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        let since_march_0 = days + DAYS_TO_1970;
        let cycle = since_march_0.div_euclid(DAYS_PER_400_YEARS);
        let of_cycle = since_march_0.rem_euclid(DAYS_PER_400_YEARS);
        let year_of_cycle = (of_cycle - of_cycle / 1460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
        let of_year = of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let march_month = (5 * of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = cycle * 400 + year_of_cycle + i64::from(month <= 2);
        Self {
            second: (of_day % 60) as u8,
            minute: (of_day / 60 % 60) as u8,
            hour: (of_day / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (of_year - days_before_month(march_month) + 1) as u8,
            month: month as u8,
            year: year.rem_euclid(10_000) as u32,
        }
    }

    /// Seconds since the beginning of 1970. Fields out of range carry over into the next (the 31st of June
    /// is the 1st of July), and a month that is none counts as the nearest.
    pub(super) fn to_seconds(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let cycle = year.div_euclid(400);
        let of_cycle = year.rem_euclid(400);
        let days = cycle * DAYS_PER_400_YEARS + of_cycle * 365 + of_cycle / 4 - of_cycle / 100
            + days_before_month(march_month)
            + i64::from(self.day)
            - 1
            - DAYS_TO_1970;
        days * SECONDS_PER_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        let date = |seconds| {
            let time = DateTime::from_seconds(seconds);
            (time.year, time.month, time.day, time.weekday)
        };
        assert_eq!(date(0), (1970, 1, 1, 5));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3));
        assert_eq!(date(1_709_164_800), (2024, 2, 29, 5));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2));
        assert_eq!(date(LAST_SECOND), (9999, 12, 31, 6));
        assert_eq!(DateTime::from_seconds(LAST_SECOND).second, 59);
    }

    proptest! {
        #[test]
        fn there_and_back(seconds in -62_167_219_200..=LAST_SECOND) {
            prop_assert_eq!(DateTime::from_seconds(seconds).to_seconds(), seconds);
        }
    }
}
