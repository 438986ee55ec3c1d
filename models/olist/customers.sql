-- Olist: one row per customer, with the city of the last order.
--
-- The data has no names and no e-mail addresses. The key is the hash of `customer_unique_id`; see transactions.sql.
--
-- source olist_customers_dataset: olist_customers*
-- columns olist_customers_dataset: customer_id, customer_unique_id, customer_city
-- source olist_orders_dataset: olist_orders*
-- columns olist_orders_dataset: order_id, customer_id, order_status, order_purchase_timestamp

SELECT customer_id, city, _delivery, _source_file, _source_row
FROM (
    SELECT
        xxhash64(lower(trim(c.customer_unique_id))) AS customer_id,
        c.customer_city AS city,
        ROW_NUMBER() OVER (
            PARTITION BY lower(trim(c.customer_unique_id))
            ORDER BY o.order_purchase_timestamp DESC, c._delivery DESC, c._source_row DESC
        ) AS recency,
        c._delivery, c._source_file, c._source_row
    FROM olist_customers_dataset c
    LEFT JOIN olist_orders_dataset o ON o.customer_id = c.customer_id
    WHERE c.customer_unique_id <> ''
)
WHERE recency = 1
